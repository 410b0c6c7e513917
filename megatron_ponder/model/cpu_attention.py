"""Causal attention on CPUs for training, as large matrix products over blocks of queries.

PyTorch's CPU kernel works in blocks too small for the matrix library to reach its speed at the sequence lengths that
CPUs train on. Blocks of queries against all keys before them cost a few per cent more arithmetic and take about 0.7 of
its time. Memory is linear in the length: probabilities of one block at a time, computed again in the backward pass.
"""

import torch
from torch import Tensor

BLOCK = 128


def causal_attention(q_BTND: Tensor, k_BTND: Tensor, v_BTND: Tensor, scale: float) -> Tensor:
    """softmax(scale · q kᵀ, causal) v, (B, T, N, D); as many heads of keys and values as of queries.

    Logits are in the type of the inputs, so that fp32 or wider ones are wanted.
    """
    B, _, N, _ = q_BTND.shape
    y = _CausalAttention.apply(*(x.transpose(1, 2).flatten(0, 1) for x in (q_BTND, k_BTND, v_BTND)), scale)
    return y.unflatten(0, (B, N)).transpose(1, 2)


class _CausalAttention(torch.autograd.Function):
    """The same with batch and heads as one dimension in front, (B · N, T, D)."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        y = torch.empty_like(q)
        for start, end in _blocks(q):
            y[:, start:end] = torch.bmm(_probabilities(q, k, start, end, scale), v[:, :end])
        ctx.save_for_backward(q, k, v)
        ctx.scale = scale
        return y

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v = ctx.saved_tensors
        grad = grad.contiguous()
        grad_q, grad_k, grad_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for start, end in _blocks(q):
            p, grad_y = _probabilities(q, k, start, end, ctx.scale), grad[:, start:end]
            grad_v[:, :end] += torch.bmm(p.transpose(1, 2), grad_y)
            grad_p = torch.bmm(grad_y, v[:, :end].transpose(1, 2))
            grad_logits = torch._softmax_backward_data(grad_p, p, -1, p.dtype)
            grad_q[:, start:end] = _scaled_product(grad_logits, k[:, :end], ctx.scale)
            grad_k[:, :end] += _scaled_product(grad_logits.transpose(1, 2), q[:, start:end], ctx.scale)
        return grad_q, grad_k, grad_v, None


def _blocks(q: Tensor) -> list[tuple[int, int]]:
    length = q.shape[1]
    return [(start, min(start + BLOCK, length)) for start in range(0, length, BLOCK)]


def _probabilities(q: Tensor, k: Tensor, start: int, end: int, scale: float) -> Tensor:
    """Of one block of queries over the keys up to its end, (B · N, end - start, end)."""
    logits = _scaled_product(q[:, start:end], k[:, :end].transpose(1, 2), scale)
    rows = end - start
    logits[:, :, start:] += q.new_full((rows, rows), float("-inf")).triu_(1)
    return logits.softmax(-1)


def _scaled_product(a: Tensor, b: Tensor, scale: float) -> Tensor:
    return torch.baddbmm(a.new_empty(1, 1, 1), a, b, beta=0, alpha=scale)
