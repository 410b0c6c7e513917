"""The factor that gives hidden states of a pretrained model the size of its embeddings, where they are to be latents.

Embeddings of pretrained models are small numbers, and hidden states after the final norm are not: blocks that have only
seen the former would be shown something many times as large.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from megatron_ponder.base.errors import UserError
from megatron_ponder.base.texts import read_text
from megatron_ponder.checkpoint.load import load_weights
from megatron_ponder.config import Config, PonderConfig
from megatron_ponder.data.tokenizer import load_tokenizer
from megatron_ponder.model.ponder import PonderLM

AUTO = ("latent_scale", "initial_latent_scale")
# How much of a text is read.
ROWS, LENGTH = 8, 512


def is_wanted(ponder: PonderConfig) -> bool:
    """Whether anything is to be measured."""
    return "auto" in (getattr(ponder, name) for name in AUTO)


@torch.no_grad()
def with_scale(config: Config, weights: Mapping[str, Tensor], tokens_BL: Tensor | None) -> Config:
    """The configuration with the number that `auto` stands for, of four digits.

    It is the root mean square of token embeddings as they enter over that of final hidden states: on a text, or,
    without one, of the whole table over what the final norm gives where channels are alike before it.

    Args:
        config: resolved.
        weights: whole tensors by parameter name; those of a plain model are read.
        tokens_BL: int64 ids of a text; None for none.

    Raises:
        UserError: if that is no number by which latents could be multiplied.
    """
    if tokens_BL is None:
        embedded = weights["embedding.weight"].float() * config.ponder.embedding_scale
        hidden = torch.stack([weights[name].float() for name in weights if name.startswith("transformer.norm.")])
        scale = _rms(embedded) / (_rms(hidden) * len(hidden) ** 0.5)
    else:
        plain = replace(config.ponder, mode="vanilla", latent_scale=1.0, initial_latent_scale=1.0)
        model = PonderLM(config.model, plain)
        load_weights(model, {name: weights[name] for name, _ in model.named_parameters()})
        output = model.jacobi(tokens_BL, 0, model.rule("none"))
        scale = _rms(model.embed(tokens_BL)) / _rms(output.output_BLH)
    if not 1e-6 <= scale <= 1e6:
        raise UserError(
            f"embeddings are {scale:.3g} times as large as hidden states, by which latents cannot be multiplied; check "
            "the weights, or give a number as ponder.latent_scale"
        )
    wanted = {name: float(f"{scale:.4g}") for name in AUTO if getattr(config.ponder, name) == "auto"}
    return replace(config, ponder=replace(config.ponder, **wanted))


def tokens_of(text: Path, tokenizer: Path, longest: int) -> Tensor:
    """The beginning of a text as sequences of ids, int64 (B, L).

    Args:
        text: file.
        tokenizer: file or folder of the model's.
        longest: most tokens of a sequence.

    Raises:
        UserError: if it cannot be read, or has no token.
    """
    ids = load_tokenizer(tokenizer).encode(read_text(text))
    length = min(LENGTH, longest, len(ids))
    if not length:
        raise UserError(f"{text} has no text to measure ponder.latent_scale on; give another file")
    rows = min(ROWS, len(ids) // length)
    return torch.tensor(ids[: rows * length]).view(rows, length)


def _rms(x: Tensor) -> float:
    return float(x.double().square().mean().sqrt())
