"""The stack of blocks that every pass runs."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megatron_ponder.config import ModelConfig
from megatron_ponder.config.run import RecomputeKind
from megatron_ponder.model.attention import KeysAndValues, LayerCache, Slots
from megatron_ponder.model.block import Block
from megatron_ponder.model.compiled import CompiledBlock
from megatron_ponder.model.norms import make_norm
from megatron_ponder.parallel.mesh import Axis


@dataclass(frozen=True)
class Recompute:
    """What the backward pass computes again in place of being kept.

    Attributes:
        kind: `block`, all but the inputs of blocks; `attention`, attention alone; `none`.
        passes: in the first so many passes only; None for all.
    """

    kind: RecomputeKind = "none"
    passes: int | None = None

    def of_pass(self, index: int) -> RecomputeKind:
        """What is computed again of one pass."""
        return self.kind if self.passes is None or index < self.passes else "none"


@dataclass(frozen=True)
class ModelPart:
    """The part of a model that one pipeline rank holds.

    Attributes:
        layers: indices of its blocks in the whole stack.
        first: it has the embedding.
        last: it has the final norm, the router and the head.
    """

    layers: range
    first: bool = True
    last: bool = True

    @property
    def is_whole(self) -> bool:
        """Whether nothing of the model is elsewhere."""
        return self.first and self.last


class Transformer(nn.Module):
    """The blocks of one part of a model and, in the last part, the final norm.

    Blocks have the names that they have in the whole stack.

    Attributes:
        axis: the tensor ranks.
        blocks: by their names.
        norm: the final one; None in other parts than the last.
        compiled: what runs a block where gradients are wanted; None to run it as it is written.
    """

    def __init__(self, config: ModelConfig, axis: Axis, part: ModelPart | None = None) -> None:
        super().__init__()
        part = part or ModelPart(range(config.num_layers))
        self.axis = axis
        self.blocks = nn.ModuleDict({str(layer): Block(config, axis) for layer in part.layers})
        self.norm = make_norm(config, axis) if part.last else None
        self.compiled: CompiledBlock | None = None

    def forward(
        self,
        x_BTH: Tensor,
        slots: Slots,
        caches: Sequence[LayerCache] | None = None,
        recompute: RecomputeKind = "none",
        earlier: Sequence[tuple[KeysAndValues, ...]] | None = None,
    ) -> Tensor | tuple[Tensor, list[tuple[KeysAndValues, ...]]]:
        """The residual stream after these blocks, in the last part normed.

        Args:
            x_BTH: the residual stream before them.
            slots: what its positions are; those that are not kept end in the last block of the whole stack.
            caches: one for each block.
            recompute: what the backward pass computes again.
            earlier: for each block what it made of the steps before that of the slots; None for slots of no one step.

        Returns:
            (B, T, H), in the last part (B, kept slots, H); and of the slots of a step, `earlier` with what this one
            made.
        """
        every, made = slots._replace(kept=slice(None)), []
        recompute = recompute if torch.is_grad_enabled() else "none"
        run = self.compiled if self.compiled is not None and torch.is_grad_enabled() else Block.__call__
        last = None if self.norm is None else len(self.blocks) - 1
        for index, block in enumerate(self.blocks.values()):
            own = slots if index == last else every
            if earlier is not None:
                own = own._replace(step=slots.step._replace(earlier=earlier[index]))
            inputs = (block, x_BTH, own, None if caches is None else caches[index])
            if recompute == "block":
                result = checkpoint(run, *inputs, use_reentrant=False, preserve_rng_state=False)
            else:
                result = run(*inputs, recipes=True, recompute_attention=recompute == "attention")
            if earlier is None:
                x_BTH = result
            else:
                x_BTH, new = result
                made.append((*earlier[index], new))
        y_BTH = x_BTH if self.norm is None else self.norm(x_BTH)
        return y_BTH if earlier is None else (y_BTH, made)
