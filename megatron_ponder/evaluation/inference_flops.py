"""Floating-point operations of inference, counted from executed slots."""

import torch
from torch import Tensor

from megatron_ponder.estimates.part import part_sizes
from megatron_ponder.model.modes.ponderlm import candidates
from megatron_ponder.model.ponder import PonderLM


def inference_flops(executed_BL: Tensor, model: PonderLM, exits: bool = False) -> Tensor:
    """Σ_{k=0..K̂} layers · (2 · block parameters + 4 · H · n) + 2 · V · H for every token.

    n counts the cached slots that a slot sees: where steps are interleaved, all up to itself, or the first slot of
    every token and its own token's others if no other token sees these; in passes with keys of their own, one of every
    token. Where every pass predicts, 2 · V · H counts once a pass, and reading a prediction costs 2 · H for each of
    its likeliest tokens; where an exit looks at every prediction, it counts once a slot.

    Args:
        executed_BL: int64, K̂ of every token of every sequence.
        model: its sizes are read.
        exits: whether the steps ended by a confidence exit.

    Returns:
        fp64 (B, L).
    """
    whole, layers = part_sizes(model.model_config, model.ponder_config), model.model_config.num_layers
    slots = (executed_BL + 1).double()
    if model.passes.own:
        tokens = torch.arange(1, slots.shape[1] + 1, device=slots.device)
        attended = slots * tokens + slots * (slots - 1) / 2
    elif model.passes.interleaved:
        before = slots.cumsum(1) - slots
        attended = slots * before + slots * (slots + 1) / 2  # summed over the token's slots, each seeing itself
    else:
        attended = slots * torch.arange(1, slots.shape[1] + 1, device=slots.device)
    flops = layers * (2 * whole.block.parameters * slots + 4 * whole.block.query * attended)
    if model.passes.predicts:
        mixture = 2 * candidates(whole.columns) * whole.block.hidden
        return flops + 2 * whole.table * slots + mixture * (slots - 1)
    return flops + 2 * whole.table * (slots if exits else 1)
