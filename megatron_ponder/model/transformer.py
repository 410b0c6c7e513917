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
        kept: Tensor | None = None,
    ) -> Tensor:
        """Hidden states after the final norm.

        Arguments as in `Attention.forward`, with one cache a block.

        Returns:
            (B, T, H), or (B, len(kept), H).
        """
        for index, block in enumerate(self.blocks):
            cache = None if caches is None else caches[index]
            inputs = (x_BTH, angles, log_w_BT, mask, cache, kept if block is self.blocks[-1] else None)
            if self.recompute and torch.is_grad_enabled():
                x_BTH = checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False)
            else:
                x_BTH = block(*inputs, recipes=True)
        return self.norm(x_BTH)
