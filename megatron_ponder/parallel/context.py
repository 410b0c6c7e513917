"""Context ranks, of which each has a share of the tokens of every sequence, and what they exchange around attention.

Shares are contiguous and equal. The latents of a token stay with it, so that passes, routing and losses are those of
the share alone. Only attention sees all slots: an all-to-all before it gives every rank all slots of a share of the
heads, and one after it gives them back (Ulysses, arXiv 2309.14509). log w goes the same way, once for all layers.
"""

import math
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_ponder.parallel.collectives import gather_from_ranks
from megatron_ponder.parallel.mesh import Axis


class SlotShares(NamedTuple):
    """Which slots of a forward the context ranks have.

    Attributes:
        axis: the context ranks.
        counts: slots of a row that each of them has.
        order: int64, where all slots stand among those of the ranks one behind the other; None if they stand so.
        back: int64, where those stand among all; None likewise.
    """

    axis: Axis
    counts: tuple[int, ...]
    order: Tensor | None = None
    back: Tensor | None = None


def equal_shares(axis: Axis, slots: int) -> SlotShares | None:
    """The shares of ranks that have so many slots of a row each; None if there is one rank."""
    return None if axis.size == 1 else SlotShares(axis, (slots,) * axis.size)


def head_repeats(heads: int, ranks: int) -> int:
    """How often heads of keys and values are repeated, so that context ranks divide them."""
    return math.lcm(heads, ranks) // heads


def take_heads(x_BTND: Tensor, shares: SlotShares) -> Tensor:
    """Own slots of all heads → (B, all slots, N / ranks, D), of this rank's heads; fewer heads are repeated first."""
    axis, counts, order, back = shares
    if (repeats := head_repeats(x_BTND.shape[2], axis.size)) > 1:
        x_BTND = x_BTND.repeat_interleave(repeats, 2)
    parts = x_BTND.unflatten(2, (axis.size, -1)).permute(2, 1, 0, 3, 4).flatten(0, 1)
    y_TBND = _AllToAll.apply(parts, axis, (x_BTND.shape[1],) * axis.size, counts)
    y_BTND = y_TBND.transpose(0, 1)
    return y_BTND if order is None else _Reorder.apply(y_BTND, order, back)


def take_slots(y_BTND: Tensor, shares: SlotShares) -> Tensor:
    """All slots of this rank's heads → (B, own slots, N · ranks, D), of all heads."""
    axis, counts, order, back = shares
    if back is not None:
        y_BTND = _Reorder.apply(y_BTND, back, order)
    own = counts[axis.rank]
    parts = _AllToAll.apply(y_BTND.transpose(0, 1), axis, counts, (own,) * axis.size)
    return parts.unflatten(0, (axis.size, own)).permute(2, 1, 0, 3, 4).flatten(2, 3)


def all_slots(x_BT: Tensor, shares: SlotShares) -> Tensor:
    """A number of every own slot → (B, all slots), on every rank; its gradient is summed over them."""
    return take_heads(x_BT[..., None, None].expand(-1, -1, shares.axis.size, -1), shares)[..., 0, 0]


def whole_rows(x_BL: Tensor, axis: Axis) -> Tensor:
    """Something of every own token → (B, tokens of all shares), without a gradient."""
    return gather_from_ranks(x_BL.detach(), axis)


def own_tokens(x_BL: Tensor, axis: Axis) -> Tensor:
    """(B, tokens of all shares, ..) → (B, those of this rank, ..)."""
    return x_BL.unflatten(1, (axis.size, -1))[:, axis.rank]


class _AllToAll(torch.autograd.Function):
    """Of the first dimension so much goes to every rank, and so much comes from it."""

    @staticmethod
    def forward(ctx, x: Tensor, axis: Axis, sent: tuple[int, ...], received: tuple[int, ...]) -> Tensor:
        ctx.axis, ctx.sent, ctx.received = axis, sent, received
        return _all_to_all(x, axis, sent, received)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return _all_to_all(grad, ctx.axis, ctx.received, ctx.sent), None, None, None


def _all_to_all(x: Tensor, axis: Axis, sent: tuple[int, ...], received: tuple[int, ...]) -> Tensor:
    result = x.new_empty(sum(received), *x.shape[1:])
    dist.all_to_all_single(result, x.contiguous(), list(received), list(sent), group=axis.group)
    return result


class _Reorder(torch.autograd.Function):
    """Slots in another order, whose gradient needs no sum."""

    @staticmethod
    def forward(ctx, x: Tensor, order: Tensor, back: Tensor) -> Tensor:
        ctx.save_for_backward(back)
        return x.index_select(1, order)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad.index_select(1, *ctx.saved_tensors), None, None
