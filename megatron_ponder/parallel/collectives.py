"""Collectives with gradients, over the ranks that share a layer, and agreement between ranks."""

from collections.abc import Callable
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_ponder.base.errors import UserError, describe
from megatron_ponder.parallel.mesh import Axis

Result = TypeVar("Result")


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad, group=ctx.group)
        return grad, None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, group: ProcessGroup) -> Tensor:
        x = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis, ctx.width = axis, x.shape[-1]
        parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(axis.size)]
        dist.all_gather(parts, x.contiguous(), group=axis.group)
        return torch.cat(parts, -1)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad, group=ctx.axis.group)
        return grad.narrow(-1, ctx.width * ctx.axis.rank, ctx.width), None


def copy_to_ranks(x: Tensor, axis: Axis) -> Tensor:
    """Enter a sharded region: the same x on every rank; its gradient is summed over them."""
    return x if axis.size == 1 else _Copy.apply(x, axis.group)


def sum_over_ranks(x: Tensor, axis: Axis) -> Tensor:
    """Leave a sharded region: partial results are summed; every rank gets the same gradient."""
    return x if axis.size == 1 else _Sum.apply(x, axis.group)


def gather_from_ranks(x: Tensor, axis: Axis) -> Tensor:
    """(..., n), another on every rank → (..., ranks · n), the same on every rank; its gradient is summed over them."""
    return x if axis.size == 1 else _Gather.apply(x, axis)


def least_of_ranks(x: Tensor, axis: Axis) -> Tensor:
    """The smallest of what the ranks have, number by number, without a gradient."""
    if axis.size == 1:
        return x
    x = x.clone()
    dist.all_reduce(x, dist.ReduceOp.MIN, group=axis.group)
    return x


def together(action: Callable[[], Result], group: ProcessGroup | None = None) -> Result:
    """Run `action` on every rank; if it fails for the user's reason on any, it fails on all.

    Without this, a rank that stops leaves the others waiting in their next collective.

    Args:
        action: what this rank does.
        group: of the ranks; the default group unless given. A thread beside training needs one of its own.

    Raises:
        UserError: the first failing rank's own error, on every rank.
    """
    result, message = None, None
    try:
        result = action()
    except (UserError, OSError) as error:
        message = describe(error)
    if dist.is_initialized() and dist.get_world_size(group) > 1:
        messages = [None] * dist.get_world_size(group)
        dist.all_gather_object(messages, message, group=group)
        message = next((m for m in messages if m is not None), None)
    if message is not None:
        raise UserError(message, shared=True)
    return result


def from_first(action: Callable[[], Result]) -> Result:
    """What `action` returns on the first rank of all, on every rank; without other ranks, what it returns here.

    Raises:
        UserError: the first rank's own error, on every rank.
    """
    first = not dist.is_initialized() or dist.get_rank() == 0
    result = together(lambda: action() if first else None)
    if dist.is_initialized() and dist.get_world_size() > 1:
        results = [result]
        dist.broadcast_object_list(results, src=0)
        return results[0]
    return result


def from_all(item: Result) -> list[Result]:
    """The items of all ranks, in their order, on every rank."""
    if not dist.is_initialized():
        return [item]
    items = [item] * dist.get_world_size()
    dist.all_gather_object(items, item)
    return items
