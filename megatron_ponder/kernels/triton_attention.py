"""Causal attention with key weights on GPUs: log w is added to the logits as it is, in fp32, and no channel is folded.

One operation for PyTorch and its compilers, with the shapes of its results and its gradient; the code that runs is in
`triton_code/weighted_attention.py`. It holds no state and uses no atomics, so that results repeat bit by bit.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_ponder.kernels.segments import Segments


class Blocks(NamedTuple):
    """How a program of one kernel is laid out.

    Attributes:
        queries, keys: slots of a block.
        warps: of a program.
        stages: blocks that are loaded while others are computed.
    """

    queries: int
    keys: int
    warps: int
    stages: int


class Layout(NamedTuple):
    """The blocks of each of the three kernels."""

    forward: Blocks
    backward_queries: Blocks
    backward_keys: Blocks


def layout(head_size: int, dtype: torch.dtype, capability: int) -> Layout:
    """Blocks that do not exceed the shared memory of a GPU, and spill registers in fp32 with wide heads alone.

    Those of an A100 take no more than the 99 KiB of GPUs of its kind with less memory, and of workstations.

    Args:
        head_size: channels of a head, at most 128.
        dtype: of queries, keys and values.
        capability: of the GPU, such as 80 (A100) or 90 (H100).
    """
    if dtype == torch.float32:
        wide = padded(head_size) > 64
        return Layout(Blocks(32, 32, 8, 1), Blocks(32, 32, 8, 1), Blocks(32, 32, 8 if wide else 4, 1))
    if padded(head_size) <= 64:
        return Layout(Blocks(128, 64, 8, 3), Blocks(128, 64, 8, 3), Blocks(64, 128, 8, 3))
    if head_size != padded(head_size):  # whose loads need masks
        return Layout(Blocks(64, 64, 8, 3), Blocks(64, 32, 8, 2), Blocks(64, 32, 8, 2))
    if not 90 <= capability < 120:  # 227 KiB of shared memory
        return Layout(Blocks(64, 64, 8, 3), Blocks(64, 64, 8, 2), Blocks(64, 64, 8, 2))
    return Layout(Blocks(128, 64, 8, 3), Blocks(128, 64, 8, 2), Blocks(32, 64, 8, 2))


def padded(head_size: int) -> int:
    """Channels that are computed for a head: a power of two, at least 16."""
    return max(16, 1 << (head_size - 1).bit_length())


def weighted_attention(
    q_BTND: Tensor, k_BTMD: Tensor, v_BTMD: Tensor, scale: float, log_w_BT: Tensor | None, segments: Segments | None
) -> Tensor:
    """Attention from every slot to those of its segment up to itself.

    Args:
        q_BTND: queries of N heads, in bf16, fp16 or fp32.
        k_BTMD, v_BTMD: keys and values of M heads; M divides N.
        scale: factor on the logits.
        log_w_BT: log weight of each key; None where every weight is 1.
        segments: of the B · T slots; None if every row is one.

    Returns:
        (B, T, N, D).
    """
    inputs = [x.contiguous() for x in (q_BTND, k_BTMD, v_BTMD)]
    log_w = None if log_w_BT is None else log_w_BT.float().contiguous()
    if segments is None:
        return weighted_forward(*inputs, log_w, None, None, scale)[0]
    inputs = [x.flatten(0, 1).unsqueeze(0) for x in inputs]
    assert inputs[0].numel() < 2**31  # offsets within a row are int32
    log_w = None if log_w is None else log_w.view(1, -1)
    return weighted_forward(*inputs, log_w, segments.starts, segments.ends, scale)[0].view(q_BTND.shape)


def constants(head_size: int, group: int, blocks: Blocks, weighted: bool, segmented: bool) -> dict[str, Any]:
    """What a kernel is compiled for.

    Args:
        head_size: channels of a head.
        group: heads of queries for each of keys.
        blocks: of the kernel.
        weighted: keys have weights.
        segmented: rows are of several segments.
    """
    return {
        "GROUP": group,
        "HEAD": head_size,
        "WIDTH": padded(head_size),
        "QUERIES": blocks.queries,
        "KEYS": blocks.keys,
        "WEIGHTED": weighted,
        "SEGMENTED": segmented,
        "PRECISION": "ieee",  # of fp32 alone, which would be rounded to TF32
        "num_warps": blocks.warps,
        "num_stages": blocks.stages,
        "enable_fp_fusion": True,
    }


def _launch_options(
    q: Tensor, k: Tensor, log_w: Tensor | None, starts: Tensor | None
) -> tuple[Layout, list[dict[str, Any]]]:
    """The blocks of each kernel, and what it is compiled for."""
    major, minor = torch.cuda.get_device_capability(q.device) if q.is_cuda else (9, 0)
    chosen, group = layout(q.shape[-1], q.dtype, 10 * major + minor), q.shape[2] // k.shape[2]
    weighted, segmented = log_w is not None, starts is not None
    return chosen, [constants(q.shape[-1], group, blocks, weighted, segmented) for blocks in chosen]


@torch.library.custom_op("megatron_ponder::weighted_attention", mutates_args=())
def weighted_forward(
    q: Tensor, k: Tensor, v: Tensor, log_w: Tensor | None, starts: Tensor | None, ends: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """The output (B, T, N, D), and log2 of every query's sum of exponentials (B, N, T)."""
    from megatron_ponder.kernels.triton_code.weighted_attention import forward

    out, log_sums = _forward_fake(q, k, v, log_w, starts, ends, scale)
    batch, length, heads, _ = q.shape
    blocks, compiled_for = _launch_options(q, k, log_w, starts)
    forward[-(-length // blocks.forward.queries), batch * heads](
        q, k, v, q if log_w is None else log_w, q if starts is None else starts, out, log_sums,
        scale * math.log2(math.e), length, heads, **compiled_for[0]
    )  # fmt: skip
    return out, log_sums


@weighted_forward.register_fake
def _forward_fake(q, k, v, log_w, starts, ends, scale) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[0], q.shape[2], q.shape[1], dtype=torch.float32)


@torch.library.custom_op("megatron_ponder::weighted_attention_backward", mutates_args=())
def weighted_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, log_w: Tensor | None, starts: Tensor | None, ends: Tensor | None,
    out: Tensor, log_sums: Tensor, scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k and v, and of log w by head of keys (B, M, T), which is empty without weights."""
    from megatron_ponder.kernels.triton_code.weighted_attention import backward_keys, backward_queries

    gradients = _backward_fake(grad, q, k, v, log_w, starts, ends, out, log_sums, scale)
    (batch, length, heads, _), kv_heads = q.shape, k.shape[2]
    grad, products, factor = grad.contiguous(), torch.empty_like(log_sums), scale * math.log2(math.e)
    weights, seen = q if log_w is None else log_w, (q, q) if starts is None else (starts, ends)
    blocks, compiled_for = _launch_options(q, k, log_w, starts)
    backward_queries[-(-length // blocks.backward_queries.queries), batch * heads](
        q, k, v, weights, seen[0], out, log_sums, grad, gradients[0], products, factor, scale, length, heads,
        **compiled_for[1]
    )  # fmt: skip
    backward_keys[-(-length // blocks.backward_keys.keys), batch * kv_heads](
        q, k, v, weights, *seen, log_sums, products, grad, *gradients[1:], factor, scale, length, kv_heads,
        **compiled_for[2]
    )  # fmt: skip
    return gradients


@weighted_backward.register_fake
def _backward_fake(grad, q, k, v, log_w, starts, ends, out, log_sums, scale) -> tuple[Tensor, ...]:
    of_w = (0,) if log_w is None else (k.shape[0], k.shape[2], k.shape[1])
    return *(x.new_empty(x.shape) for x in (q, k, v)), q.new_empty(of_w, dtype=torch.float32)


def _keep(ctx, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output)


def _backward(ctx, grad: Tensor, _: Tensor) -> tuple:
    *of_qkv, of_w = weighted_backward(grad, *ctx.saved_tensors, ctx.scale)
    return *of_qkv, of_w.sum(1) if ctx.needs_input_grad[3] else None, None, None, None


weighted_forward.register_autograd(_backward, setup_context=_keep)
