"""The likeliest tokens of what a head predicts, with logits of a chunk of tokens at a time."""

import torch
from torch import Tensor

from megatron_ponder.kernels.cross_entropy import add_product, chunk_rows, chunks
from megatron_ponder.parallel.candidates import likeliest_of_ranks, own_likeliest
from megatron_ponder.parallel.mesh import Axis


class _ChunkedLikeliest(torch.autograd.Function):
    """Keeps places alone, which say where the few logits that are read lay among those that are none any more."""

    @staticmethod
    def forward(
        ctx, hidden_NH: Tensor, weight_VH: Tensor, count: int, axis: Axis, vocab_size: int
    ) -> tuple[Tensor, Tensor]:
        count = min(count, len(weight_VH))
        values_Nn = hidden_NH.new_empty(len(hidden_NH), count)
        places_Nn = torch.empty_like(values_Nn, dtype=torch.long)
        for rows in chunks(len(hidden_NH), chunk_rows(len(weight_VH), weight_VH.dtype)):
            values_Nn[rows], places_Nn[rows] = own_likeliest(hidden_NH[rows] @ weight_VH.T, count, axis, vocab_size)
        ctx.save_for_backward(hidden_NH, weight_VH, places_Nn)
        ctx.mark_non_differentiable(places_Nn)
        return values_Nn, places_Nn

    @staticmethod
    def backward(ctx, grad_Nn: Tensor, _places: None) -> tuple[Tensor, Tensor, None, None, None]:
        hidden_NH, weight_VH, places_Nn = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden_NH)
        grad_weight = torch.zeros_like(weight_VH, dtype=torch.promote_types(weight_VH.dtype, torch.float32))

        def compute(rows: slice) -> None:  # a function, so that its logits are gone before those of the next chunk
            grad_nV = grad_Nn.new_zeros(len(grad_Nn[rows]), len(weight_VH))
            grad_nV.scatter_(1, places_Nn[rows], grad_Nn[rows])
            torch.mm(grad_nV, weight_VH, out=grad_hidden[rows])
            add_product(grad_weight, grad_nV.T, hidden_NH[rows])

        for rows in chunks(len(hidden_NH), chunk_rows(len(weight_VH), weight_VH.dtype)):
            compute(rows)
        return grad_hidden, grad_weight.to(weight_VH.dtype), None, None, None


def chunked_likeliest(hidden: Tensor, weight: Tensor, count: int, axis: Axis, vocab_size: int) -> tuple[Tensor, Tensor]:
    """The largest logits of a head without bias, as `parallel.candidates.likeliest` finds them in whole ones.

    The gradient of the weight is added up over chunks in fp32 or better.

    Args:
        hidden: (..., H), what the head reads, of at least one token.
        weight: (V / ranks, H), this rank's part of the head.
        count: how many, or all there are.
        axis: the tensor ranks.
        vocab_size: V without padding.

    Returns:
        The logits in fp32 or better, falling, and int64 ids: (..., n) each, n = min(count, V), on every rank alike. The
        gradient of the logits is summed over the ranks.
    """
    count = min(count, vocab_size)
    own = _ChunkedLikeliest.apply(hidden.flatten(0, -2), weight, count, axis, vocab_size)
    values, places = (part.unflatten(0, hidden.shape[:-1]) for part in own)
    return likeliest_of_ranks(values, places, weight.shape[0], count, axis)
