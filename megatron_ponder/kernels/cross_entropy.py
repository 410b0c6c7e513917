"""Cross-entropy over a vocabulary that is split over the tensor ranks; the logits are never gathered."""

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_ponder.parallel.mesh import Axis


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits_NV: Tensor, labels_N: Tensor, axis: Axis, padding: int, overwrite: bool) -> Tensor:
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
        ctx.save_for_backward(weights, total, local, elsewhere)
        ctx.dtype = logits_NV.dtype
        return total.log() - label_logit

    @staticmethod
    def backward(ctx, grad_N: Tensor) -> tuple[Tensor, None, None, None, None]:
        weights, total, local, elsewhere = ctx.saved_tensors
        grad = weights.mul_((grad_N / total).unsqueeze(-1))  # in place: there is one backward pass, and V is large
        at_label = (-grad_N).masked_fill(elsewhere, 0).unsqueeze(-1)
        grad.scatter_add_(-1, local, at_label)
        return grad.to(ctx.dtype), None, None, None, None


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
    columns = logits.shape[-1]
    beyond = 0 if vocab_size is None else columns * (axis.rank + 1) - vocab_size
    padding = min(max(beyond, 0), columns)
    loss = _CrossEntropy.apply(logits.flatten(0, -2), labels.flatten(), axis, padding, overwrite)
    return loss.view(labels.shape)
