"""Attention of single queries over keys that lie in blocks of a pool, found by tables: on a GPU in Triton.

The twin in PyTorch gathers the blocks, and computes what has no kernel. Both have shapes that depend on no length, so
that a captured graph replays them with others.
"""

import functools
import importlib.util
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

# Programs for each multiprocessor, so that it has others to turn to while one waits for memory.
_PROGRAMS = 4
_MOST_SPLITS = 64


class Pages(NamedTuple):
    """One layer's keys and values in n blocks of b slots, and what each of T queries sees of them.

    Attributes:
        keys_nMbD: keys of M heads.
        values_nMbD: values.
        log_w_nb: log weights of the keys, in fp32 or better.
        tables_rW: int64, blocks of each row of the cache.
        rows_T: int64, the row that each query reads.
        lengths_T: int64, how many of its first slots it sees; at least one.
    """

    keys_nMbD: Tensor
    values_nMbD: Tensor
    log_w_nb: Tensor
    tables_rW: Tensor
    rows_T: Tensor
    lengths_T: Tensor


def attend_pages(q_TND: Tensor, pages: Pages, scale: float) -> Tensor:
    """Attention of every query to the slots that it sees.

    Args:
        q_TND: queries of N heads; M divides N.
        pages: keys and values.
        scale: factor on the logits.

    Returns:
        (T, N, D).
    """
    compute = in_triton if q_TND.is_cuda and q_TND.dtype != torch.float64 and has_triton() else gathered
    return compute(q_TND, pages, scale)


@functools.cache
def has_triton() -> bool:
    """Whether Triton is installed."""
    return importlib.util.find_spec("triton") is not None


def gathered(q_TND: Tensor, pages: Pages, scale: float) -> Tensor:
    """The twin, as `attend_pages`: gathers all blocks that a row may have, and masks what a query does not see."""
    table_TW = pages.tables_rW[pages.rows_T]
    keys, values = (x[table_TW].transpose(2, 3).flatten(1, 2) for x in (pages.keys_nMbD, pages.values_nMbD))
    log_w_TS = pages.log_w_nb[table_TW].flatten(1)
    unseen_TS = torch.arange(log_w_TS.shape[1], device=q_TND.device) >= pages.lengths_T[:, None]
    wide = log_w_TS.dtype
    q_TMGD = q_TND.unflatten(1, (keys.shape[2], -1)).to(wide) * scale
    logits = torch.einsum("tmgd,tsmd->tmgs", q_TMGD, keys.to(wide)) + log_w_TS[:, None, None]
    p = logits.masked_fill(unseen_TS[:, None, None], -torch.inf).softmax(-1)
    # What nobody has written may be no numbers, of which 0 times one is none either.
    values = values.to(wide).masked_fill(unseen_TS[:, :, None, None], 0)
    return torch.einsum("tmgs,tsmd->tmgd", p, values).flatten(1, 2).to(q_TND.dtype)


def in_triton(q_TND: Tensor, pages: Pages, scale: float, splits: int | None = None) -> Tensor:
    """The kernels, as `attend_pages`; of bf16, fp16 and fp32.

    Args:
        q_TND, pages, scale: as there.
        splits: parts of the keys, a power of two; as many as fill the GPU unless given.
    """
    from megatron_ponder.kernels.triton_code.paged_keys import add_parts, attend_part

    slots, heads, head_size = q_TND.shape
    kv_heads = pages.keys_nMbD.shape[1]
    splits = splits or splits_of(slots * kv_heads, pages.tables_rW.shape[1] * pages.keys_nMbD.shape[2], q_TND.device)
    sizes = layout(heads // kv_heads, head_size, q_TND.dtype)
    out = torch.empty_like(q_TND, memory_format=torch.contiguous_format)
    parts = largest = totals = out
    if splits > 1:
        parts = q_TND.new_empty(slots, heads, splits, head_size, dtype=torch.float32)
        largest, totals = parts.new_empty(2, slots, heads, splits)
    attend_part[slots, kv_heads, splits](
        q_TND.contiguous(), pages.keys_nMbD, pages.values_nMbD, pages.log_w_nb, pages.tables_rW, pages.rows_T,
        pages.lengths_T, parts, largest, totals, scale * math.log2(math.e), pages.tables_rW.shape[1],
        HEADS=kv_heads, BLOCK=pages.keys_nMbD.shape[2], SPLITS=splits, **sizes,
    )  # fmt: skip
    if splits > 1:
        add_parts[(slots * heads,)](
            parts, largest, totals, out, HEAD=head_size, WIDTH=sizes["WIDTH"], SPLITS=splits, num_warps=4
        )
    return out


def layout(group: int, head_size: int, dtype: torch.dtype) -> dict[str, Any]:
    """What the first kernel is compiled for, besides heads and blocks.

    Args:
        group: query heads that share a head of keys.
        head_size: channels of a head.
        dtype: of queries, keys and values.
    """
    wide = dtype == torch.float32
    return {
        "GROUP": group,
        "QUERIES": padded(group),
        "HEAD": head_size,
        "WIDTH": padded(head_size),
        "KEYS": 32 if wide else 64,
        "PRECISION": "ieee",
        "num_warps": 4,
        "num_stages": 1 if wide else 3,
    }


def padded(size: int) -> int:
    """A power of two, at least 16, as products of blocks want it."""
    return max(16, 1 << (size - 1).bit_length())


def splits_of(programs: int, most_slots: int, device: torch.device) -> int:
    """Parts of the keys, a power of two, so that so many programs for each of them fill a GPU.

    Args:
        programs: one for each query slot and head of keys.
        most_slots: that a query may see.
        device: a GPU; another counts as one multiprocessor.
    """
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
    wanted = min(_PROGRAMS * processors // programs, most_slots // 64, _MOST_SPLITS)
    return 1 << max(0, wanted.bit_length() - 1)
