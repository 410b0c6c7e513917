"""Causal attention within segments on CPUs: PyTorch's kernel for one run of equal segments after another.

An operation of its own, so that a compiler has one graph for any number of segments, and one output is kept for all.
"""

from collections.abc import Iterator
from itertools import groupby, pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_ponder.kernels.segments import Segments

# Runs of so few slots share calls with their neighbours, in which a mask keeps segments apart.
SHORT = 32


class _Piece(NamedTuple):
    """Slots that one call computes.

    Attributes:
        begin, end: the slots.
        rows: segments of one length that they are; 1 if they are of unlike ones, which a mask keeps apart.
        shared: they are of unlike segments.
    """

    begin: int
    end: int
    rows: int
    shared: bool

    def of(self, x_TND: Tensor) -> Tensor:
        """Its slots, heads before them, as a view (rows, N, slots of a row, D)."""
        return x_TND[self.begin : self.end].unflatten(0, (self.rows, -1)).transpose(1, 2)

    def of_queries(self, x_NT: Tensor) -> Tensor:
        """What is one number a query, as a view (rows, N, slots of a row)."""
        return x_NT[:, self.begin : self.end].unflatten(1, (self.rows, -1)).transpose(0, 1)

    def seeing(self, starts_T: Tensor, dtype: torch.dtype) -> dict[str, Any]:
        """How the call is told who sees whom."""
        if not self.shared:
            return {"is_causal": True}
        places = torch.arange(self.begin, self.end)
        visible = (places >= starts_T[self.begin : self.end, None]) & (places <= places[:, None])
        mask = torch.zeros(visible.shape, dtype=dtype).masked_fill_(~visible, -torch.inf)
        return {"is_causal": False, "attn_mask": mask[None, None]}


def segmented_attention(q_TND: Tensor, k_TMD: Tensor, v_TMD: Tensor, scale: float, segments: Segments) -> Tensor:
    """Attention from every slot to those of its segment up to itself; memory grows with T, not with its square.

    Args:
        q_TND: queries of N heads.
        k_TMD, v_TMD: keys and values of M heads; M divides N.
        scale: factor on the logits.
        segments: of the T slots.

    Returns:
        (T, N, D).
    """
    return segmented_forward(q_TND, k_TMD, v_TMD, segments.bounds, segments.starts, scale)[0]


def _pieces(bounds: list[int]) -> Iterator[_Piece]:
    """Neighbours of one length as rows of a call; where they are few slots, with other neighbours behind a mask."""
    begin = end = 0
    runs: list[int] = []  # of one length each, from begin to end: their segments
    for length, segments in groupby(last - first for first, last in pairwise(bounds)):
        rows = sum(1 for _ in segments)
        slots = rows * length
        if not slots:
            continue
        if runs and end + slots - begin > SHORT:
            yield _piece(begin, end, runs)
            begin, runs = end, []
        runs.append(rows)
        end += slots
    if runs:
        yield _piece(begin, end, runs)


def _piece(begin: int, end: int, runs: list[int]) -> _Piece:
    return _Piece(begin, end, runs[0], False) if len(runs) == 1 else _Piece(begin, end, 1, True)


@torch.library.custom_op("megatron_ponder::segmented_attention", mutates_args=())
def segmented_forward(
    q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, starts: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """The output (T, N, D), and the log of every query's sum of exponentials (N, T)."""
    out, log_sums = _forward_fake(q, k, v, bounds, starts, scale)
    for piece in _pieces(bounds.tolist()):
        computed, log_sum = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            *map(piece.of, (q, k, v)), scale=scale, **piece.seeing(starts, q.dtype)
        )
        piece.of(out).copy_(computed)
        piece.of_queries(log_sums).copy_(log_sum)
    return out, log_sums


@segmented_forward.register_fake
def _forward_fake(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, starts: Tensor, scale: float) -> tuple:
    wide = torch.promote_types(q.dtype, torch.float32)
    return q.new_empty(q.shape), q.new_empty(q.shape[1], q.shape[0], dtype=wide)


@torch.library.custom_op("megatron_ponder::segmented_attention_backward", mutates_args=())
def segmented_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, log_sums: Tensor, bounds: Tensor, starts: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    gradients = _backward_fake(grad, q, k, v, out, log_sums, bounds, starts, scale)
    for piece in _pieces(bounds.tolist()):
        computed = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *map(piece.of, (grad, q, k, v, out)), piece.of_queries(log_sums).contiguous(), 0.0,
            scale=scale, **piece.seeing(starts, q.dtype)
        )  # fmt: skip
        for whole, part in zip(gradients, computed, strict=True):
            piece.of(whole).copy_(part)
    return gradients


@segmented_backward.register_fake
def _backward_fake(grad, q, k, v, out, log_sums, bounds, starts, scale) -> tuple:
    return tuple(x.new_empty(x.shape) for x in (q, k, v))


def _keep(ctx, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output)


def _backward(ctx, grad: Tensor, _: Tensor) -> tuple:
    q, k, v, bounds, starts, out, log_sums = ctx.saved_tensors
    return *segmented_backward(grad, q, k, v, out, log_sums, bounds, starts, ctx.scale), None, None, None


segmented_forward.register_autograd(_backward, setup_context=_keep)
