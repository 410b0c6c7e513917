"""The two borders of a sharded region, where activations change between the residual stream and sharded layers.

In the residual stream every tensor rank holds all tokens, or with sequence parallelism its share of them, the last
ranks' padded with zeros. Inside a sharded region (attention, feed-forward, head) every rank has all tokens and a part
of the heads or channels. Tokens are split, not slots: the latents of a token stay with it, so that handing them from
pass to pass and routing need no communication. Of the gradient of what is applied in the residual stream, each rank has
a summand (`parallel/replicated.py`).
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from megatron_ponder.parallel.collectives import copy_to_ranks, sum_over_ranks
from megatron_ponder.parallel.mesh import Axis


def enter(x: Tensor, axis: Axis, tokens: int) -> Tensor:
    """Go from the residual stream into a sharded region.

    Args:
        x: (B, slots of this rank's tokens, ..).
        axis: the tensor ranks.
        tokens: L, of the whole sequence.

    Returns:
        (B, slots of all tokens, ..), the same on every rank. Its gradient is summed over the ranks.
    """
    if not axis.sequence_parallel:
        return copy_to_ranks(x, axis)
    return _GatherTokens.apply(x, axis, tokens)


def leave(x: Tensor, axis: Axis, tokens: int) -> Tensor:
    """Go from a sharded region, where every rank has a part of a sum, back to the residual stream.

    Args:
        x: (B, slots of all tokens, ..), a different summand on every rank.
        axis: the tensor ranks.
        tokens: L, of the whole sequence.

    Returns:
        The sum, (B, slots of this rank's tokens, ..).
    """
    if not axis.sequence_parallel:
        return sum_over_ranks(x, axis)
    return _SumAndSplitTokens.apply(x, axis, tokens)


def gather_parts(x: Tensor, axis: Axis, tokens: int) -> Tensor:
    """(B, this rank's part of L tokens, ..) → (B, L, ..) in the residual stream, of which it goes on with another part.

    Its gradient is summed over the ranks; without sequence parallelism nothing happens.
    """
    return _GatherTokens.apply(x, axis, tokens) if axis.sequence_parallel and tokens else x


def own_part(x: Tensor, axis: Axis) -> Tensor:
    """(B, L, ..) → (B, this rank's part of L tokens, ..) in the residual stream, with zeros after the last."""
    return _shares(x, axis, x.shape[1])[axis.rank] if axis.sequence_parallel and x.shape[1] else x


def all_tokens(x: Tensor, axis: Axis, tokens: int) -> Tensor:
    """(B, tokens of this rank, ..) → (B, L, ..) for a computation that every rank then repeats alike."""
    return _RepeatTokens.apply(x, axis, tokens) if axis.sequence_parallel else x


class _GatherTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, axis: Axis, tokens: int) -> Tensor:
        ctx.axis, ctx.tokens = axis, tokens
        return _gather(x, axis, tokens)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        return _reduce_scatter(grad, ctx.axis, ctx.tokens), None, None


class _SumAndSplitTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, axis: Axis, tokens: int) -> Tensor:
        ctx.axis, ctx.tokens = axis, tokens
        return _reduce_scatter(x, axis, tokens)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        return _gather(grad, ctx.axis, ctx.tokens), None, None


class _RepeatTokens(_GatherTokens):
    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        return _shares(grad, ctx.axis, ctx.tokens)[ctx.axis.rank], None, None


def _gather(x: Tensor, axis: Axis, tokens: int) -> Tensor:
    slots = x.shape[1] // axis.share(tokens)
    parts = x.new_empty(axis.size, *x.shape)
    all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # renamed in PyTorch 2.13
    all_gather(parts.flatten(0, 1), x.contiguous(), group=axis.group)
    return parts.movedim(0, 1).flatten(1, 2)[:, : tokens * slots]


def _reduce_scatter(x: Tensor, axis: Axis, tokens: int) -> Tensor:
    shares = _shares(x, axis, tokens).contiguous()
    own = torch.empty_like(shares[0])
    reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor  # as above
    reduce_scatter(own, shares.flatten(0, 1), group=axis.group)
    return own


def _shares(x: Tensor, axis: Axis, tokens: int) -> Tensor:
    """(B, slots of L tokens, ..) → (ranks, B, slots of a rank's tokens, ..), zeros after the last token."""
    slots, share = x.shape[1] // tokens, axis.share(tokens)
    missing = (axis.size * share - tokens) * slots
    if missing:
        x = F.pad(x, (0, 0) * (x.dim() - 2) + (0, missing))
    return x.unflatten(1, (axis.size, share * slots)).movedim(1, 0)
