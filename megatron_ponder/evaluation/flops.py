"""Floating-point operations of inference, counted from executed slots."""

import torch
from torch import Tensor

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
    """Σ_{k=0..K̂} (2 · block parameters + 4 · layers · H · n) + 2 · V · H for every token, n counting cached slots.

    Args:
        executed_BL: int64, K̂ of every token of every sequence.

    Returns:
        fp64 (B, L).
    """
    config = model.model_config
    slots = (executed_BL + 1).double()
    before = slots.cumsum(1) - slots
    attended = slots * before + slots * (slots + 1) / 2  # summed over the token's slots, each seeing itself
    blocks = 2 * block_parameters(model) * slots + 4 * config.num_layers * config.hidden_size * attended
    return blocks + 2 * config.vocab_size * config.hidden_size
