"""Gradient clipping where every data-parallel rank has whole gradients, and DeepSpeed leaves their norm to us."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_ponder.parallel.mesh import Axis


def clip_gradients(
    parameters: Sequence[nn.Parameter], counted: Sequence[nn.Parameter], maximum: float, model: Axis
) -> Tensor:
    """Scale gradients down to a norm, or drop them where it is not finite, so that the optimiser passes them over.

    Args:
        parameters: of this rank.
        counted: those of them that count in the norm on this rank, each of which counts on one rank of `model` alone.
        maximum: of the norm; 0 for none.
        model: the ranks that hold one copy of the model.

    Returns:
        The norm before, the same on all ranks.
    """
    square = torch.nn.utils.get_total_norm([parameter.grad for parameter in counted]).square()
    if model.size > 1:
        dist.all_reduce(square, group=model.group)
    norm = square.sqrt()
    if norm.isfinite():
        torch.nn.utils.clip_grads_with_norm_(parameters, maximum or float("inf"), norm)
    else:
        for parameter in parameters:
            parameter.grad = None
    return norm
