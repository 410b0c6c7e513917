"""Attention in which the further slots of a token are keys for that token alone.

All slots see the first slots of their token and of those before it, and the further slots of their own token up to
themselves. First slots lie in a causal triangle of L tokens, in which the slots of a token stand beside each other as
heads that share keys do: S slots a token are S times the work of one, and not S². What a token sees of its own further
slots is a product of few rows. The two are one softmax: sums of exponentials are added, and the backward pass of either
is given the output and the sum of both.

An operation of its own, so that a compiler sees one. log w, which first slots do not have, travels in no channel.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_ponder.kernels.segmented_attention import segmented_backward, segmented_forward
from megatron_ponder.kernels.segments import Segments
from megatron_ponder.kernels.triton_attention import weighted_backward, weighted_forward


class _Tokens(NamedTuple):
    """Segments of B · L tokens, as in `Segments`; None for rows of one each."""

    bounds: Tensor | None
    starts: Tensor | None
    ends: Tensor | None


def own_attention(
    q_BTND: Tensor,
    k_BTMD: Tensor,
    v_BTMD: Tensor,
    scale: float,
    log_w_BT: Tensor | None,
    segments: Segments | None,
    slots: int,
) -> Tensor:
    """Attention of S slots of each of L tokens, T = L · S.

    Args:
        q_BTND: queries of N heads.
        k_BTMD, v_BTMD: keys and values of M heads; M divides N.
        scale: factor on the logits.
        log_w_BT: log weight of each key, 0 of first slots; None where every weight is 1.
        segments: of the B · L tokens; None if every row is one.
        slots: S, at least 2.

    Returns:
        (B, T, N, D).
    """
    tokens = _Tokens(None, None, None) if segments is None else _Tokens(*segments[:3])
    return _attend(q_BTND, k_BTMD, v_BTMD, log_w_BT, *tokens, slots, scale)[0]


@torch.library.custom_op("megatron_ponder::own_attention", mutates_args=())
def _attend(
    q: Tensor, k: Tensor, v: Tensor, log_w: Tensor | None, bounds: Tensor | None, starts: Tensor | None,
    ends: Tensor | None, slots: int, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The output (B, T, N, D), and the log of every query's sum of exponentials (B, L, M, S, G), N = M · G."""
    (k_BLMD, k_BLKMD), (v_BLMD, v_BLKMD) = (_first_and_further(x, slots) for x in (k, v))
    q_BLMSGD = _by_token(q, slots, k.shape[2])
    out, log_sums = _attend_tokens(q_BLMSGD, k_BLMD, v_BLMD, _Tokens(bounds, starts, ends), scale)
    wide, of_tokens, further = log_sums.dtype, log_sums[:, :, :, 1:], out[:, :, :, 1:]
    logits = _own_logits(q_BLMSGD[:, :, :, 1:].to(wide), k_BLKMD.to(wide), log_w, slots, scale)
    both = torch.logaddexp(of_tokens, logits.logsumexp(-1))
    own = _mix(logits.sub_(both.unsqueeze(-1)).exp_(), v_BLKMD.to(wide))
    further.copy_(own.addcmul_(further.to(wide), (of_tokens - both).exp_().unsqueeze(-1)))
    of_tokens.copy_(both)
    return _by_slot(out), log_sums


@_attend.register_fake
def _attend_fake(q, k, v, log_w, bounds, starts, ends, slots, scale) -> tuple[Tensor, Tensor]:
    (batch, length, heads, _), groups = q.shape, k.shape[2]
    of_queries = batch, length // slots, groups, slots, heads // groups
    return q.new_empty(q.shape), q.new_empty(of_queries, dtype=torch.promote_types(q.dtype, torch.float32))


@torch.library.custom_op("megatron_ponder::own_attention_backward", mutates_args=())
def _differentiate(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, log_w: Tensor | None, bounds: Tensor | None, starts: Tensor | None,
    ends: Tensor | None, out: Tensor, log_sums: Tensor, slots: int, scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k, v and log w (B, T), which is empty without weights."""
    wide, heads, tokens = log_sums.dtype, k.shape[2], _Tokens(bounds, starts, ends)
    gradients = _differentiate_fake(grad, q, k, v, log_w, bounds, starts, ends, out, log_sums, slots, scale)
    (k0, further_k), (v0, further_v) = (_first_and_further(x, slots) for x in (k, v))
    grad, q, out = (_by_token(x, slots, heads) for x in (grad, q, out))
    of_q, of_k0, of_v0 = _differentiate_tokens(grad, q, k0, v0, out, log_sums, tokens, scale)
    later_q, later_grad, further_k, further_v = (
        x.to(wide) for x in (q[:, :, :, 1:], grad[:, :, :, 1:], further_k, further_v)
    )
    p = _own_logits(later_q, further_k, log_w, slots, scale).sub_(log_sums[:, :, :, 1:].unsqueeze(-1)).exp_()
    mean = (later_grad * out[:, :, :, 1:]).sum(-1, keepdim=True)
    of_logits = _products(later_grad, further_v, 0.0).sub_(mean).mul_(p)
    of_q[:, :, :, 1:] += _mix(of_logits, further_k).mul_(scale)
    parts = (of_k0, _collect(of_logits, later_q).mul_(scale)), (of_v0, _collect(p, later_grad))
    for gradient, (of_first, of_further) in zip(gradients[1:3], parts, strict=True):
        first, further = _first_and_further(gradient, slots)
        first.copy_(of_first)
        further.copy_(of_further)
    gradients[0].copy_(_by_slot(of_q))
    if log_w is not None:
        first, further = _first_and_further(gradients[3], slots)
        first.zero_()
        further.copy_(of_logits.sum((2, 3, 4)))
    return gradients


@_differentiate.register_fake
def _differentiate_fake(grad, q, k, v, log_w, bounds, starts, ends, out, log_sums, slots, scale) -> tuple[Tensor, ...]:
    of_w = log_sums.new_empty(0 if log_w is None else k.shape[:2])
    return *(x.new_empty(x.shape) for x in (q, k, v)), of_w


def _keep(ctx, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.slots, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output)


def _backward(ctx, grad: Tensor, _: Tensor) -> tuple:
    *of_qkv, of_w = _differentiate(grad, *ctx.saved_tensors, ctx.slots, ctx.scale)
    return *of_qkv, of_w if ctx.needs_input_grad[3] else None, None, None, None, None, None


_attend.register_autograd(_backward, setup_context=_keep)


def _first_and_further(x: Tensor, slots: int) -> tuple[Tensor, Tensor]:
    """Views of the first slots (B, L, ..), and of the K others of every token (B, L, K, ..)."""
    x = x.unflatten(1, (-1, slots))
    return x[:, :, 0], x[:, :, 1:]


def _by_token(x: Tensor, slots: int, groups: int) -> Tensor:
    """(B, L · S, M · G, D) → (B, L, M, S, G, D): queries of a token that share keys lie side by side."""
    return x.unflatten(1, (-1, slots)).unflatten(3, (groups, -1)).transpose(2, 3).contiguous()


def _by_slot(x: Tensor) -> Tensor:
    """Back to (B, L · S, M · G, D)."""
    return x.transpose(2, 3).flatten(3, 4).flatten(1, 2)


def _attend_tokens(q: Tensor, k: Tensor, v: Tensor, tokens: _Tokens, scale: float) -> tuple[Tensor, Tensor]:
    """All slots see first slots: (B, L, M, S, G, D), and the logs of sums of exponentials (B, L, M, S, G)."""
    shape, q = q.shape, q.flatten(2, 4)
    if _in_triton(q):
        inputs = (_in_rows(x, tokens) for x in (q, k, v))
        out, log_sums = weighted_forward(*inputs, None, tokens.starts, tokens.ends, scale)
        out, log_sums = out.view(q.shape), log_sums.transpose(1, 2).contiguous().mul_(math.log(2))
    elif tokens.bounds is not None:
        flat = (x.flatten(0, 1) for x in (q, k, v))
        out, log_sums = segmented_forward(*flat, tokens.bounds, tokens.starts, scale)
        log_sums = log_sums.T.contiguous()
    else:
        inputs = (x.transpose(1, 2) for x in (q, k, v))
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        out, log_sums = (x.transpose(1, 2).contiguous() for x in kernel(*inputs, is_causal=True, scale=scale))
    return out.view(shape), log_sums.view(shape[:-1])


def _differentiate_tokens(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, log_sums: Tensor, tokens: _Tokens, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of queries and of first slots, through these."""
    shape, (grad, q, out, log_sums) = q.shape, (x.flatten(2, 4) for x in (grad, q, out, log_sums))
    if _in_triton(q):
        grad, q, k, v, out, log_sums = (_in_rows(x, tokens) for x in (grad, q, k, v, out, log_sums))
        log_sums = (log_sums / math.log(2)).transpose(1, 2).contiguous()
        of_tokens = None, tokens.starts, tokens.ends
        of_q, of_k, of_v, _ = weighted_backward(grad, q, k, v, *of_tokens, out, log_sums, scale)
    elif tokens.bounds is not None:
        grad, q, k, v, out, log_sums = (x.flatten(0, 1) for x in (grad, q, k, v, out, log_sums))
        of_tokens = log_sums.T, tokens.bounds, tokens.starts
        of_q, of_k, of_v = segmented_backward(grad, q, k, v, out, *of_tokens, scale)
    else:
        grad, q, k, v, out, log_sums = (x.transpose(1, 2) for x in (grad, q, k, v, out, log_sums))
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        gradients = kernel(grad, q, k, v, out, log_sums, 0.0, True, scale=scale)
        of_q, of_k, of_v = (x.transpose(1, 2) for x in gradients)
    rows = shape[:2]
    return of_q.reshape(shape), of_k.reshape(*rows, *of_k.shape[-2:]), of_v.reshape(*rows, *of_v.shape[-2:])


def _in_triton(q: Tensor) -> bool:
    """Whether the kernel of GPUs computes what first slots are asked."""
    return q.is_cuda


def _in_rows(x: Tensor, tokens: _Tokens) -> Tensor:
    """As that kernel wants it: rows one behind the other if they have segments."""
    return (x if tokens.starts is None else x.flatten(0, 1).unsqueeze(0)).contiguous()


def _own_logits(q_BLMKGD: Tensor, k_BLKMD: Tensor, log_w: Tensor | None, slots: int, scale: float) -> Tensor:
    """Logits of the further slots of a token for each other, (B, L, M, K, G, K); −∞ for those behind."""
    logits = _products(q_BLMKGD, k_BLKMD, -math.inf).mul_(scale)
    if log_w is not None:
        logits += _first_and_further(log_w, slots)[1][:, :, None, None, None]
    return logits


def _products(x_BLMKGD: Tensor, y_BLKMD: Tensor, behind: float) -> Tensor:
    """Products of further slots with those up to themselves, (B, L, M, K, G, K), which are too few for matrices."""
    products = x_BLMKGD.new_full((*x_BLMKGD.shape[:-1], y_BLKMD.shape[2]), behind)
    for step, y_BLMD in enumerate(y_BLKMD.unbind(2)):
        products[:, :, :, step:, :, step] = (x_BLMKGD[:, :, :, step:] * y_BLMD[:, :, :, None, None]).sum(-1)
    return products


def _mix(p_BLMKGK: Tensor, y_BLKMD: Tensor) -> Tensor:
    """Of every further slot the sum over those up to itself, (B, L, M, K, G, D)."""
    mixed = p_BLMKGK.new_zeros(*p_BLMKGK.shape[:-1], y_BLKMD.shape[-1])
    for step, y_BLMD in enumerate(y_BLKMD.unbind(2)):
        mixed[:, :, :, step:].addcmul_(p_BLMKGK[:, :, :, step:, :, step, None], y_BLMD[:, :, :, None, None])
    return mixed


def _collect(p_BLMKGK: Tensor, x_BLMKGD: Tensor) -> Tensor:
    """Of every further slot the sum over the queries that see it, (B, L, K, M, D)."""
    steps = range(p_BLMKGK.shape[-1])
    parts = [(p_BLMKGK[:, :, :, step:, :, step, None] * x_BLMKGD[:, :, :, step:]).sum((3, 4)) for step in steps]
    return torch.stack(parts, 2)
