"""Attention in which the further slots of a token are keys for that token alone.

All slots see the first slots of their token and of those before it, and the further slots of their own token up to
themselves. First slots lie in a causal triangle of L tokens, in which the slots of a token stand beside each other as
heads that share keys do: S slots a token are S times the work of one, and not S². What a token sees of its own further
slots is a product of few rows. The two are one softmax: sums of exponentials are added, and the backward pass of either
is given the output and the sum of both.

`own_attention` is of all S slots of a token, `latent_attention` of one of the further ones, where the keys and values
of those before it are there already. Each is an operation of its own, so that a compiler sees one. log w, which first
slots do not have, travels in no channel.
"""

import math
from collections.abc import Sequence
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
    further = (x[:, :, :, 1:] for x in (q_BLMSGD, out, log_sums))
    _add_own(*further, k_BLKMD.unbind(2), v_BLKMD.unbind(2), _further_weights(log_w, slots), scale)
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
    heads, tokens = k.shape[2], _Tokens(bounds, starts, ends)
    gradients = _differentiate_fake(grad, q, k, v, log_w, bounds, starts, ends, out, log_sums, slots, scale)
    (k0, further_k), (v0, further_v) = (_first_and_further(x, slots) for x in (k, v))
    grad, q, out = (_by_token(x, slots, heads) for x in (grad, q, out))
    of_q, of_k0, of_v0 = _differentiate_tokens(grad, q, k0, v0, out, log_sums, tokens, scale)
    further = (x[:, :, :, 1:] for x in (grad, q, out, log_sums, of_q))
    of_further = _differentiate_own(
        *further, further_k.unbind(2), further_v.unbind(2), _further_weights(log_w, slots), scale
    )
    for gradient, of_first, of_steps in zip(gradients[1:3], (of_k0, of_v0), of_further[:2], strict=True):
        first, further = _first_and_further(gradient, slots)
        first.copy_(of_first)
        for step, of_step in enumerate(of_steps):
            further[:, :, step] = of_step
    gradients[0].copy_(_by_slot(of_q))
    if log_w is not None:
        first, further = _first_and_further(gradients[3], slots)
        first.zero_()
        further.copy_(of_further[2])
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


def latent_attention(
    q_BLND: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    scale: float,
    log_w_BLJ: Tensor | None,
    segments: Segments | None,
) -> Tensor:
    """Attention of the slots of one latent step j of L tokens.

    Args:
        q_BLND: queries of N heads.
        keys, values: (B, L, M, D) each, of first slots and of the latent steps 1 .. j; M divides N.
        scale: factor on the logits.
        log_w_BLJ: log weights of the j latent steps as keys; None where every weight is 1.
        segments: of the B · L tokens; None if every row is one.

    Returns:
        (B, L, N, D).
    """
    tokens = _Tokens(None, None, None) if segments is None else _Tokens(*segments[:3])
    return _attend_latent(q_BLND, list(keys), list(values), log_w_BLJ, *tokens, scale)[0]


@torch.library.custom_op("megatron_ponder::latent_attention", mutates_args=())
def _attend_latent(
    q: Tensor, keys: list[Tensor], values: list[Tensor], log_w: Tensor | None, bounds: Tensor | None,
    starts: Tensor | None, ends: Tensor | None, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The output (B, L, N, D), and the log of every query's sum of exponentials (B, L, M, 1, G), N = M · G."""
    q_BLM1GD = _by_token(q, 1, keys[0].shape[2])
    out, log_sums = _attend_tokens(q_BLM1GD, keys[0], values[0], _Tokens(bounds, starts, ends), scale)
    _add_own(q_BLM1GD, out, log_sums, keys[1:], values[1:], log_w, scale)
    return _by_slot(out), log_sums


@_attend_latent.register_fake
def _attend_latent_fake(q, keys, values, log_w, bounds, starts, ends, scale) -> tuple[Tensor, Tensor]:
    return _attend_fake(q, keys[0], values[0], log_w, bounds, starts, ends, 1, scale)


@torch.library.custom_op("megatron_ponder::latent_attention_backward", mutates_args=())
def _differentiate_latent(
    grad: Tensor, q: Tensor, keys: list[Tensor], values: list[Tensor], log_w: Tensor | None, bounds: Tensor | None,
    starts: Tensor | None, ends: Tensor | None, out: Tensor, log_sums: Tensor, scale: float,
) -> list[Tensor]:  # fmt: skip
    """Gradients of q, of keys, of values and of log w (B, L, j), with weights or without."""
    gradients = _differentiate_latent_fake(grad, q, keys, values, log_w, bounds, starts, ends, out, log_sums, scale)
    grad, q, out = (_by_token(x, 1, keys[0].shape[2]) for x in (grad, q, out))
    of_q, *of_first = _differentiate_tokens(
        grad, q, keys[0], values[0], out, log_sums, _Tokens(bounds, starts, ends), scale
    )
    of_keys, of_values, of_w = _differentiate_own(grad, q, out, log_sums, of_q, keys[1:], values[1:], log_w, scale)
    found = [_by_slot(of_q), of_first[0], *of_keys, of_first[1], *of_values, of_w]
    for gradient, each in zip(gradients, found, strict=True):
        gradient.copy_(each)
    return gradients


@_differentiate_latent.register_fake
def _differentiate_latent_fake(
    grad, q, keys, values, log_w, bounds, starts, ends, out, log_sums, scale
) -> list[Tensor]:
    of_w = log_sums.new_empty(*q.shape[:2], len(keys) - 1)
    return [*(x.new_empty(x.shape) for x in (q, *keys, *values)), of_w]


def _keep_latent(ctx, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    q, keys, values, *others, ctx.scale = inputs
    ctx.steps = len(keys)
    ctx.save_for_backward(q, *keys, *values, *others, *output)


def _backward_latent(ctx, grad: Tensor, _: Tensor) -> tuple:
    q, *given = ctx.saved_tensors
    keys, values, others = given[: ctx.steps], given[ctx.steps : 2 * ctx.steps], given[2 * ctx.steps :]
    of_q, *found = _differentiate_latent(grad, q, keys, values, *others, ctx.scale)
    of_keys, of_values, of_w = found[: ctx.steps], found[ctx.steps : 2 * ctx.steps], found[-1]
    return of_q, of_keys, of_values, None if others[0] is None else of_w, None, None, None, None


_attend_latent.register_autograd(_backward_latent, setup_context=_keep_latent)


def _first_and_further(x: Tensor, slots: int) -> tuple[Tensor, Tensor]:
    """Views of the first slots (B, L, ..), and of the K others of every token (B, L, K, ..)."""
    x = x.unflatten(1, (-1, slots))
    return x[:, :, 0], x[:, :, 1:]


def _further_weights(log_w: Tensor | None, slots: int) -> Tensor | None:
    """log w of the K further slots of every token (B, L, K), of that of all slots (B, L · S)."""
    return None if log_w is None else _first_and_further(log_w, slots)[1]


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


def _add_own(
    q: Tensor, out: Tensor, log_sums: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor], log_w: Tensor | None,
    scale: float,
) -> None:  # fmt: skip
    """Add to what queries see of first slots what they see of the K further ones of their token.

    Args:
        q: (B, L, M, Q, G, D), of the last Q of those.
        out: the same shape, the output of first slots alone, which is changed.
        log_sums: (B, L, M, Q, G), as is this.
        keys, values: (B, L, M, D) each of the K.
        log_w: (B, L, K), or None.
        scale: factor on the logits.
    """
    wide = log_sums.dtype
    logits = _own_logits(q.to(wide), [k.to(wide) for k in keys], log_w, scale)
    both = torch.logaddexp(log_sums, logits.logsumexp(-1))
    own = _mix(logits.sub_(both.unsqueeze(-1)).exp_(), [v.to(wide) for v in values])
    out.copy_(own.addcmul_(out.to(wide), (log_sums - both).exp_().unsqueeze(-1)))
    log_sums.copy_(both)


def _differentiate_own(
    grad: Tensor, q: Tensor, out: Tensor, log_sums: Tensor, of_q: Tensor, keys: Sequence[Tensor],
    values: Sequence[Tensor], log_w: Tensor | None, scale: float,
) -> tuple[list[Tensor], list[Tensor], Tensor]:  # fmt: skip
    """Gradients of keys, of values and of log w (B, L, K); that of queries is added to `of_q`."""
    wide = log_sums.dtype
    grad, q = grad.to(wide), q.to(wide)
    keys, values = ([x.to(wide) for x in each] for each in (keys, values))
    p = _own_logits(q, keys, log_w, scale).sub_(log_sums.unsqueeze(-1)).exp_()
    of_logits = _products(grad, values, 0.0).sub_((grad * out).sum(-1, keepdim=True)).mul_(p)
    of_q += _mix(of_logits, keys).mul_(scale)
    return [x.mul_(scale) for x in _collect(of_logits, q)], _collect(p, grad), of_logits.sum((2, 3, 4))


def _own_logits(q_BLMQGD: Tensor, keys: Sequence[Tensor], log_w: Tensor | None, scale: float) -> Tensor:
    """Logits of further slots for those of their token, (B, L, M, Q, G, K); −∞ for those behind."""
    logits = _products(q_BLMQGD, keys, -math.inf).mul_(scale)
    if log_w is not None:
        logits += log_w[:, :, None, None, None]
    return logits


def _seeing(step: int, steps: int, queries: int) -> slice:
    """Which of the last so many of a token's further slots see that of a step, counted from 0."""
    return slice(max(0, step - (steps - queries)), None)


def _products(x_BLMQGD: Tensor, ys: Sequence[Tensor], behind: float) -> Tensor:
    """Products of further slots with those up to themselves, (B, L, M, Q, G, K), which are too few for matrices."""
    products = x_BLMQGD.new_full((*x_BLMQGD.shape[:-1], len(ys)), behind)
    for step, y_BLMD in enumerate(ys):
        seeing = _seeing(step, len(ys), x_BLMQGD.shape[3])
        products[:, :, :, seeing, :, step] = (x_BLMQGD[:, :, :, seeing] * y_BLMD[:, :, :, None, None]).sum(-1)
    return products


def _mix(p_BLMQGK: Tensor, ys: Sequence[Tensor]) -> Tensor:
    """Of every further slot the sum over those up to itself, (B, L, M, Q, G, D)."""
    mixed = p_BLMQGK.new_zeros(*p_BLMQGK.shape[:-1], ys[0].shape[-1])
    for step, y_BLMD in enumerate(ys):
        seeing = _seeing(step, len(ys), p_BLMQGK.shape[3])
        mixed[:, :, :, seeing].addcmul_(p_BLMQGK[:, :, :, seeing, :, step, None], y_BLMD[:, :, :, None, None])
    return mixed


def _collect(p_BLMQGK: Tensor, x_BLMQGD: Tensor) -> list[Tensor]:
    """Of every further slot the sum over the queries that see it, (B, L, M, D) each."""
    *_, queries, _, steps = p_BLMQGK.shape
    every = [(step, _seeing(step, steps, queries)) for step in range(steps)]
    return [
        (p_BLMQGK[:, :, :, seeing, :, step, None] * x_BLMQGD[:, :, :, seeing]).sum((3, 4)) for step, seeing in every
    ]
