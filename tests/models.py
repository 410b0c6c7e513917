"""Small models for tests, with routers whose decisions really vary."""

import torch

from megatron_ponder.config import Config, read_config
from megatron_ponder.model.ponder import PonderLM
from megatron_ponder.parallel.sharding import initialize

SMALL = {
    "model.hidden_size": 32,
    "model.num_layers": 2,
    "model.num_heads": 4,
    "model.ffn_hidden_size": 48,
    "model.vocab_size": 61,
    "data.sequence_length": 64,
    "ponder.latent_steps": 2,
}

# Latents of another size, by a factor that is trained.
LEARNED = {"ponder__latent_scale": "learned", "ponder__initial_latent_scale": 0.3}

# Features that no family has together.
MIXED = {
    "model__norm": "layer",
    "model__gated_ffn": "true",
    "model__activation": "gelu_tanh",
    "model__biases": "all",
    "model__qk_norm": "true",
    "model__head_size": 12,
    "model__rotary_fraction": 0.5,
    "model__rope_scaling": "yarn",
    "model__rope_factor": 4.0,
    "model__rope_original_length": 16,
    "model__residual": "parallel",
    "model__num_kv_heads": 2,
}


def small_config(**overrides) -> Config:
    """A resolved configuration; overrides are written `model__family="gpt_neox"`."""
    values = SMALL | {key.replace("__", "."): value for key, value in overrides.items()}
    return read_config([f"--{key}={value}" for key, value in values.items()])


def small_model(seed: int = 0, router_scale: float = 2.0, eod_id: int | None = None, **overrides) -> PonderLM:
    """A model in fp64 whose weights are large enough that every part matters."""
    config = small_config(**overrides)
    model = PonderLM(config.model, config.ponder, eod_id=eod_id, inference=config.inference).double()
    initialize(model, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            if name.startswith("router.output"):
                parameter.copy_(router_scale * noise / parameter.shape[-1] ** (0.5 if parameter.dim() == 2 else 1))
            elif parameter.dim() == 2 and name.startswith("transformer"):
                parameter.copy_(noise / parameter.shape[-1] ** 0.5)
            elif parameter.dim() == 1:
                parameter.add_(0.1 * noise)
    return model


def random_tokens(batch: int, length: int, vocab_size: int = 61, seed: int = 0) -> torch.Tensor:
    """int64 (batch, length)."""
    return torch.randint(0, vocab_size, (batch, length), generator=torch.Generator().manual_seed(seed))
