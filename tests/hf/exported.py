"""The same model twice: PonderLM, and as Hugging Face sees it."""

import torch

from megatron_ponder.config import Config
from megatron_ponder.hf.export import export_config
from megatron_ponder.hf.modeling_ponderlm import PonderLMForCausalLM
from megatron_ponder.hf.weights import to_export
from megatron_ponder.model.ponder import PonderLM


def weights_of(model: PonderLM) -> dict[str, torch.Tensor]:
    """fp32 weights by name."""
    return {name: parameter.detach().float() for name, parameter in model.named_parameters()}


def hugging_face(model: PonderLM, refinements: int = 2) -> PonderLMForCausalLM:
    """The export's model with the same weights in the same type."""
    ours = Config(model=model.model_config, ponder=model.ponder_config, inference=model.inference)
    config = export_config(ours, None)
    config.ponder_jacobi_iterations, config.ponder_eod_id = refinements, model.eod_id
    twin = PonderLMForCausalLM(config).to(model.embedding.weight.dtype).eval()
    missing = twin.load_state_dict(to_export(dict(model.named_parameters())), strict=not config.tie_word_embeddings)
    assert missing.missing_keys == (["lm_head.weight"] if config.tie_word_embeddings else [])
    return twin
