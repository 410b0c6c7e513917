"""Gradients of parameters that every tensor rank holds whole, where each rank has seen its share of tokens or heads.

With sequence parallelism these parameters are applied in the residual stream, of which a rank has its tokens, so that
its gradient is one summand; with or without it, so is that of a norm of heads, of which a rank has its own. Sums are
taken of whole gradients, after all passes: once a step in one message, or, where the gradient does not stay with its
parameter until the step, when a backward pass has added it up.
"""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_ponder.parallel.mesh import Axis
from megatron_ponder.parallel.sharding import declarations


def replicated_parameters(module: nn.Module) -> list[nn.Parameter]:
    """Those of which each rank has a summand of the gradient; none in a single process."""
    return [
        p
        for _, p, spec, axis in declarations(module)
        if spec.shard_dim is None and axis.size > 1 and (axis.sequence_parallel or spec.of_heads)
    ]


def sum_gradients(gradients: Iterable[Tensor], axis: Axis) -> None:
    """Sum over ranks, in place, in one message for each type.

    Args:
        gradients: of the same parameters on every rank, in one order.
        axis: the ranks, of which each has a summand.
    """
    by_type: dict[torch.dtype, list[Tensor]] = {}
    for gradient in gradients:
        by_type.setdefault(gradient.dtype, []).append(gradient)
    for parts in by_type.values():
        flat = torch.cat([part.flatten() for part in parts])
        dist.all_reduce(flat, group=axis.group)
        sums = flat.split([part.numel() for part in parts])
        torch._foreach_copy_(parts, [own.view_as(part) for own, part in zip(sums, parts, strict=True)])


def sum_in_backward(parameters: Iterable[nn.Parameter], axis: Axis) -> None:
    """Sum each gradient over the tensor ranks when a backward pass has it whole, before anybody takes it away."""

    def whole(gradient: Tensor) -> Tensor:
        gradient = gradient.clone(memory_format=torch.contiguous_format)  # others may read what autograd hands over
        dist.all_reduce(gradient, group=axis.group)
        return gradient

    for parameter in parameters:
        parameter.register_hook(whole)
