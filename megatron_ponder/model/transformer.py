"""The stack of blocks that every pass runs."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megatron_ponder.config import ModelConfig
from megatron_ponder.model.attention import LayerCache
from megatron_ponder.model.block import Block, make_norm
from megatron_ponder.model.rope import Rotation
from megatron_ponder.parallel.mesh import Axis


class Transformer(nn.Module):
    """Blocks and the final norm.

    Attributes:
        recompute: keep only the inputs of blocks for the backward pass and compute the rest again.
    """

    def __init__(self, config: ModelConfig, axis: Axis) -> None:
        super().__init__()
        self.recompute = False
        self.blocks = nn.ModuleList(Block(config, axis) for _ in range(config.num_layers))
        self.norm = make_norm(config, axis)

    def forward(
        self,
        x_BTH: Tensor,
        angles: Rotation,
        log_w_BT: Tensor | None = None,
        mask: Tensor | None = None,
        caches: Sequence[LayerCache] | None = None,
    ) -> Tensor:
        """Hidden states after the final norm, (B, T, H); arguments as in `Attention.forward`, one cache a block."""
        for index, block in enumerate(self.blocks):
            if caches is not None:
                x_BTH = block(x_BTH, angles, log_w_BT, mask, caches[index])
            elif self.recompute and torch.is_grad_enabled():
                x_BTH = checkpoint(block, x_BTH, angles, log_w_BT, mask, use_reentrant=False, preserve_rng_state=False)
            else:
                x_BTH = block(x_BTH, angles, log_w_BT, mask)
        return self.norm(x_BTH)
