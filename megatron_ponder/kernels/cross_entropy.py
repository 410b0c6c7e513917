"""Cross-entropy over a vocabulary that is split over the tensor ranks; the logits are never gathered."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_ponder.parallel.mesh import Axis

# Of logits that are there at once. Fewer tokens a chunk would let the sum of gradients, which every chunk adds to, cost
# as much as the products.
CHUNK_BYTES = 2**30


class _Softmax(NamedTuple):
    """What the gradient of logits is made of; a weight over its row's total is a probability."""

    weights_NV: Tensor
    total_N: Tensor
    local_N1: Tensor
    elsewhere_N: Tensor


def _losses(logits_NV: Tensor, labels_N: Tensor, axis: Axis, padding: int, overwrite: bool) -> tuple[Tensor, _Softmax]:
    wide = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32))
    largest = wide[:, : max(1, wide.shape[-1] - padding)].amax(-1, keepdim=True)
    if axis.size > 1:
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=axis.group)
    shifted = wide.sub_(largest) if overwrite or wide is not logits_NV else wide - largest
    columns = wide.shape[-1]
    local = labels_N - columns * axis.rank
    elsewhere = (local < 0) | (local >= columns)
    local = local.masked_fill(elsewhere, 0).unsqueeze(-1)
    label_logit = shifted.gather(-1, local).squeeze(-1).masked_fill(elsewhere, 0)
    weights = shifted.exp_()
    weights[:, columns - padding :] = 0  # neither probability nor gradient
    total = weights.sum(-1)
    if axis.size > 1:
        both = torch.stack([total, label_logit])
        dist.all_reduce(both, group=axis.group)
        total, label_logit = both
    return total.log() - label_logit, _Softmax(weights, total, local, elsewhere)


def _logit_gradients(softmax: _Softmax, grad_N: Tensor) -> Tensor:
    """Gradients of logits from those of losses, in the memory of the weights: V is large."""
    grad = softmax.weights_NV.mul_((grad_N / softmax.total_N).unsqueeze(-1))
    at_label = (-grad_N).masked_fill(softmax.elsewhere_N, 0).unsqueeze(-1)
    return grad.scatter_add_(-1, softmax.local_N1, at_label)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits_NV: Tensor, labels_N: Tensor, axis: Axis, padding: int, overwrite: bool) -> Tensor:
        losses, softmax = _losses(logits_NV, labels_N, axis, padding, overwrite)
        ctx.save_for_backward(*softmax)
        ctx.dtype = logits_NV.dtype
        return losses

    @staticmethod
    def backward(ctx, grad_N: Tensor) -> tuple[Tensor, None, None, None, None]:
        grad = _logit_gradients(_Softmax(*ctx.saved_tensors), grad_N)  # which are used once: there is one backward pass
        return grad.to(ctx.dtype), None, None, None, None


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Computes gradients with the losses, as far as the one factor on their sum, so that no logits are kept."""

    @staticmethod
    def forward(
        ctx, hidden_NH: Tensor, weight_VH: Tensor, labels_N: Tensor, axis: Axis, padding: int, wanted: bool
    ) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(weight_VH.dtype, torch.float32)
        losses_N = labels_N.new_empty(labels_N.shape, dtype=wide)
        if wanted:
            grad_hidden, grad_weight = torch.empty_like(hidden_NH), torch.zeros_like(weight_VH, dtype=wide)
            ctx.save_for_backward(grad_hidden, grad_weight)
            ctx.dtype = weight_VH.dtype

        def compute(rows: slice) -> None:  # a function, so that its logits are gone before those of the next chunk
            hidden = hidden_NH[rows]
            losses_N[rows], softmax = _losses(hidden @ weight_VH.T, labels_N[rows], axis, padding, overwrite=True)
            if wanted:
                grad = _logit_gradients(softmax, torch.ones_like(losses_N[rows])).to(hidden.dtype)
                torch.mm(grad, weight_VH, out=grad_hidden[rows])
                add_product(grad_weight, grad.T, hidden)

        for rows in chunks(len(labels_N), chunk_rows(len(weight_VH), weight_VH.dtype)):
            compute(rows)
        ctx.mark_non_differentiable(losses_N)
        return losses_N.sum(), losses_N

    @staticmethod
    def backward(ctx, grad: Tensor, _losses: None) -> tuple[Tensor, Tensor, None, None, None, None]:
        grad_hidden, grad_weight = ctx.saved_tensors
        return _scaled(grad_hidden, grad, ctx.dtype), _scaled(grad_weight, grad, ctx.dtype), None, None, None, None


def chunks(count: int, most: int) -> Iterator[slice]:
    """Slices of at most so many of `count` rows, as even as can be."""
    size = -(-count // -(-count // most))
    return (slice(start, start + size) for start in range(0, count, size))


def _scaled(tensor: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """tensor · factor, rounded once, to another type."""
    return torch.mul(tensor, factor.view(1), out=torch.empty_like(tensor, dtype=dtype))


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a b; each product may be rounded to the type of its factors, their sum is not."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    else:
        total.add_(a @ b)


def chunk_rows(columns: int, dtype: torch.dtype) -> int:
    """The most tokens whose logits are there at once.

    Args:
        columns: of this rank's part of the vocabulary.
        dtype: of the head.
    """
    return max(1, CHUNK_BYTES // (columns * logit_bytes(dtype)))


def logit_bytes(dtype: torch.dtype) -> int:
    """Bytes of a logit while its loss is computed: in fp32 or better, and in a narrower type also as it was."""
    wide = torch.promote_types(dtype, torch.float32)
    return wide.itemsize + (dtype.itemsize if dtype != wide else 0)


def vocab_parallel_cross_entropy(
    logits: Tensor, labels: Tensor, axis: Axis, vocab_size: int | None = None, overwrite: bool = False
) -> Tensor:
    """Negative log-likelihood of each label, in nats, computed in fp32 or better.

    Args:
        logits: (..., V / ranks), this rank's part of the vocabulary.
        labels: int64 (...), ids in the whole vocabulary.
        axis: the tensor ranks.
        vocab_size: V without padding; columns from there on get no probability. None if there are none.
        overwrite: use the memory of the logits, which must not be read afterwards.

    Returns:
        (...), the same on every rank.
    """
    padding = _padding(logits.shape[-1], axis, vocab_size)
    loss = _CrossEntropy.apply(logits.flatten(0, -2), labels.flatten(), axis, padding, overwrite)
    return loss.view(labels.shape)


def chunked_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, axis: Axis, vocab_size: int | None = None
) -> tuple[Tensor, Tensor]:
    """The same of what a head without bias predicts, with logits of a chunk of tokens at a time.

    The gradient of the weight is added up over chunks in fp32 or better, and its backward pass may run more than once.

    Args:
        hidden: (..., H), what the head reads.
        weight: (V / ranks, H), this rank's part of the head.
        labels: int64 (...), ids in the whole vocabulary, of at least one token.
        axis: the tensor ranks.
        vocab_size: V without padding; None if there is none.

    Returns:
        The sum of the losses, with its gradient, of which each rank has its part of the vocabulary's; and the losses
        (...), without.
    """
    padding, wanted = _padding(weight.shape[0], axis, vocab_size), torch.is_grad_enabled()
    total, losses = _ChunkedCrossEntropy.apply(hidden.flatten(0, -2), weight, labels.flatten(), axis, padding, wanted)
    return total, losses.view(labels.shape)


def _padding(columns: int, axis: Axis, vocab_size: int | None) -> int:
    beyond = 0 if vocab_size is None else columns * (axis.rank + 1) - vocab_size
    return min(max(beyond, 0), columns)
