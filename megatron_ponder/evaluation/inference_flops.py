"""Floating-point operations of inference, counted from executed slots."""

import torch
from torch import Tensor

from megatron_ponder.model.modes.ponderlm import CANDIDATES
from megatron_ponder.model.ponder import PonderLM
from megatron_ponder.parallel.sharding import declarations


def block_parameters(model: PonderLM) -> int:
    """Parameters of all blocks, over all tensor ranks."""
    return sum(
        torch.Size(spec.shape).numel()
        for name, _, spec, _ in declarations(model)
        if name.startswith("transformer.blocks.")
    )


def inference_flops(executed_BL: Tensor, model: PonderLM) -> Tensor:
    """Σ_{k=0..K̂} (2 · block parameters + 4 · layers · H · n) + 2 · V · H for every token.

    n counts the cached slots that a slot sees: where steps are interleaved, all up to itself, and in passes with keys
    of their own, one of every token. Where every pass predicts, 2 · V · H counts once a pass, and reading a prediction
    costs 2 · H for each of its likeliest tokens.

    Args:
        executed_BL: int64, K̂ of every token of every sequence.

    Returns:
        fp64 (B, L).
    """
    config = model.model_config
    slots = (executed_BL + 1).double()
    if model.passes.interleaved:
        before = slots.cumsum(1) - slots
        attended = slots * before + slots * (slots + 1) / 2  # summed over the token's slots, each seeing itself
    else:
        attended = slots * torch.arange(1, slots.shape[1] + 1, device=slots.device)
    flops = 2 * block_parameters(model) * slots + 4 * config.num_layers * config.hidden_size * attended
    head = 2 * config.vocab_size * config.hidden_size
    if model.passes.predicts:
        mixture = 2 * min(CANDIDATES, config.vocab_size) * config.hidden_size
        return flops + head * slots + mixture * (slots - 1)
    return flops + head
