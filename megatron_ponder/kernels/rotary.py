"""Rotation of the first channels of every head, in the half-split convention of the Hugging Face checkpoints."""

from typing import NamedTuple

import torch
from torch import Tensor

from megatron_ponder.kernels.backward import own_backward


class Rotation(NamedTuple):
    """Angles of every slot's position.

    Attributes:
        cos: (B or 1, T, 1, rotated / 2).
        sin: the same shape.
    """

    cos: Tensor
    sin: Tensor

    def repeat(self, slots: int) -> "Rotation":
        """The rotation of the interleaved sequence: all slots of a token have its position."""
        if slots == 1:
            return self
        return Rotation(self.cos.repeat_interleave(slots, 1), self.sin.repeat_interleave(slots, 1))


def rotate(x: Tensor, angles: Rotation, channels: Tensor | None = None) -> Tensor:
    """Rotate the first channels of every head; the others pass through.

    Args:
        x: (B, T, heads, head size).
        angles: of the T positions.
        channels: (B or 1, T or 1, further), appended to every head.

    Returns:
        (B, T, heads, head size + further).
    """
    if torch.compiler.is_compiling():
        return _composed(x, angles.cos, angles.sin, channels)
    compute = _Rotate.apply if own_backward() else _rotated
    return compute(x, angles.cos, angles.sin, channels)


class _Rotate(torch.autograd.Function):
    """Rotates into a buffer wide enough for further channels, so that these cost no copy of their own."""

    @staticmethod
    def forward(ctx, x: Tensor, cos: Tensor, sin: Tensor, channels: Tensor | None) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.head_size = x.shape[-1]
        return _rotated(x, cos, sin, channels)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None, Tensor | None]:
        cos, sin = ctx.saved_tensors
        grad_x = grad.new_empty(*grad.shape[:-1], ctx.head_size)
        _turn(grad, cos, -sin, grad_x)
        grad_x[..., 2 * cos.shape[-1] :] = grad[..., 2 * cos.shape[-1] : ctx.head_size]
        grad_channels = grad[..., ctx.head_size :].sum(2) if ctx.needs_input_grad[3] else None
        return grad_x, None, None, grad_channels


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, channels: Tensor | None) -> Tensor:
    head_size, rotated = x.shape[-1], 2 * cos.shape[-1]
    y = x.new_empty(*x.shape[:-1], head_size + (0 if channels is None else channels.shape[-1]))
    _turn(x, cos, sin, y)
    if rotated < head_size:
        y[..., rotated:head_size] = x[..., rotated:]
    if channels is not None:
        y[..., head_size:] = channels.unsqueeze(2)
    return y


def _composed(x: Tensor, cos: Tensor, sin: Tensor, channels: Tensor | None) -> Tensor:
    """What a compiler fuses into the buffer that `_rotated` fills by hand."""
    half = cos.shape[-1]
    first, second, others = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    parts = [(first * cos - second * sin).to(x.dtype), (second * cos + first * sin).to(x.dtype), others]
    if channels is not None:
        parts.append(channels.unsqueeze(2).expand(*x.shape[:-1], -1))
    return torch.cat(parts, -1)


def _turn(x: Tensor, cos: Tensor, sin: Tensor, out: Tensor) -> None:
    half = cos.shape[-1]
    first, second = x[..., :half], x[..., half : 2 * half]
    if x.dtype == cos.dtype:
        torch.mul(first, cos, out=out[..., :half]).addcmul_(second, sin, value=-1)
        torch.mul(second, cos, out=out[..., half : 2 * half]).addcmul_(first, sin)
    else:  # low precision: angles and products in fp32, rounded once
        out[..., :half] = first * cos - second * sin
        out[..., half : 2 * half] = second * cos + first * sin
