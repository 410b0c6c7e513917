"""The likeliest tokens of a vocabulary that is split over the tensor ranks; the logits are never gathered."""

import torch
from torch import Tensor

from megatron_ponder.parallel.collectives import gather_from_ranks
from megatron_ponder.parallel.mesh import Axis


def likeliest(logits: Tensor, count: int, axis: Axis, vocab_size: int) -> tuple[Tensor, Tensor]:
    """The largest logits, on every rank those of the whole vocabulary.

    Each rank finds its own largest, which together hold the largest of all.

    Args:
        logits: (..., V / ranks), this rank's part of the vocabulary, which may be padded at its end.
        count: how many, or all there are.
        axis: the tensor ranks.
        vocab_size: V without padding.

    Returns:
        The logits in fp32 or better, falling, and int64 ids: (..., n) each, n = min(count, V), on every rank alike. The
        gradient of the logits is summed over the ranks.
    """
    count = min(count, vocab_size)
    values, places = own_likeliest(logits, count, axis, vocab_size)
    return likeliest_of_ranks(values, places, logits.shape[-1], count, axis)


def own_likeliest(logits: Tensor, count: int, axis: Axis, vocab_size: int) -> tuple[Tensor, Tensor]:
    """The largest of this rank's logits, and their places among them; arguments as of `likeliest`.

    Returns:
        (..., n) each, n = min(count, V / ranks); the logits in their own type.
    """
    columns = logits.shape[-1]
    padding = min(max(columns * (axis.rank + 1) - vocab_size, 0), columns)
    if padding:
        beyond = torch.arange(columns, device=logits.device) >= columns - padding
        logits = logits.masked_fill(beyond, -torch.inf)
    return logits.topk(min(count, columns), -1)


def likeliest_of_ranks(values: Tensor, places: Tensor, columns: int, count: int, axis: Axis) -> tuple[Tensor, Tensor]:
    """The largest logits of all ranks, from the largest of each.

    Args:
        values, places: of this rank, as `own_likeliest` gives them.
        columns: of this rank's part of the vocabulary.
        count: how many, at most V.
        axis: the tensor ranks.

    Returns:
        As `likeliest`.
    """
    values = gather_from_ranks(values.to(torch.promote_types(values.dtype, torch.float32)), axis)
    ids = gather_from_ranks(places + columns * axis.rank, axis)
    if axis.size == 1:
        return values, ids
    values, places = values.topk(count, -1)
    return values, ids.gather(-1, places)
