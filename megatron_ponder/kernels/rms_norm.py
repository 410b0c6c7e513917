"""The root-mean-square norm, on CPUs in few passes over memory."""

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_ponder.kernels.backward import own_backward


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """x / sqrt(mean(x²) + ε) · g over the last dimension, statistics in fp32 or better.

    Args:
        x: (..., hidden).
        weight: g, (hidden,).
        epsilon: ε.

    Returns:
        The shape and type of x.
    """
    # With gradients on CPUs, PyTorch composes its norm from many passes over memory.
    if x.device.type == "cpu" and own_backward():
        return _RMSNorm.apply(x, weight, epsilon)
    return F.rms_norm(x, weight.shape, weight, epsilon)


class _RMSNorm(torch.autograd.Function):
    """Keeps its input and one number a row for the backward pass, and touches memory as seldom as it can."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        mean_square = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(x.shape[-1])
        inverse_rms = mean_square.add_(epsilon).rsqrt_()
        ctx.save_for_backward(x, weight, inverse_rms)
        return (wide * inverse_rms).to(x.dtype).mul_(weight)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, inverse_rms = ctx.saved_tensors
        normed = x * inverse_rms
        grad_weight = (grad * normed).flatten(0, -2).sum(0).to(weight.dtype)
        grad_normed = (grad * weight).to(normed.dtype)
        along = (grad_normed * normed).mean(-1, keepdim=True)
        return grad_normed.addcmul_(normed, along, value=-1).mul_(inverse_rms).to(x.dtype), grad_weight, None
