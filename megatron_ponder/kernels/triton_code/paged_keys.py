"""Attention of single queries over keys and values in blocks of a pool, with a log weight beside each key.

A program has the queries of one slot that share a head of keys, and one of SPLITS parts of the keys that the slot sees,
so that a single sequence has programs for a whole GPU; a second kernel adds up the parts. Logits are in units of log 2,
in fp32, and log w is added to them there. Every number is written by one program and summed in one order.

Slot t of head n of queries begins at (t · heads + n) · HEAD, and slot s of head m of block b of keys at
((b · HEADS + m) · BLOCK + s) · HEAD.
"""

import triton
import triton.language as tl

LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)
# Below all logits, and finite: differences of two are not NaN.
LOWEST: tl.constexpr = tl.constexpr(-1e30)


@triton.jit
def attend_part(
    q, keys, values, log_w, tables, rows, lengths, out, largest, totals, factor, width, HEADS: tl.constexpr,
    GROUP: tl.constexpr, QUERIES: tl.constexpr, HEAD: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
    KEYS: tl.constexpr, SPLITS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write the output over one part of the keys, and the largest logit and the sum of exponentials behind it.

    With one part, `out` is the whole output and the other two are not written.
    """
    slot, head, split = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    length = tl.load(lengths + slot)
    table = tables + tl.load(rows + slot) * width
    queries, channels = tl.arange(0, QUERIES), tl.arange(0, WIDTH)
    there = (queries[:, None] < GROUP) & (channels[None, :] < HEAD)
    places = (slot * HEADS + head) * GROUP + queries
    query = tl.load(q + places[:, None] * HEAD + channels[None, :], mask=there, other=0.0)
    highest = tl.full([QUERIES], LOWEST, tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    sums = tl.zeros([QUERIES, WIDTH], tl.float32)
    tiles = tl.cdiv(tl.cdiv(length, KEYS), SPLITS)
    begin = split * tiles * KEYS
    for first in range(begin, tl.minimum(begin + tiles * KEYS, length), KEYS):
        seen = first + tl.arange(0, KEYS)
        exist = seen < length
        block = tl.load(table + seen // BLOCK, mask=exist, other=0)
        at = ((block * HEADS + head) * BLOCK + seen % BLOCK)[:, None] * HEAD + channels[None, :]
        loaded = exist[:, None] & (channels[None, :] < HEAD)
        key = tl.load(keys + at, mask=loaded, other=0.0)
        weight = tl.load(log_w + block * BLOCK + seen % BLOCK, mask=exist, other=0.0)
        logits = tl.dot(query, tl.trans(key), input_precision=PRECISION) * factor + (weight * LOG2_E)[None, :]
        logits = tl.where(exist[None, :], logits, LOWEST)
        higher = tl.maximum(highest, tl.max(logits, 1))
        p = tl.exp2(logits - higher[:, None])
        fade = tl.exp2(highest - higher)
        value = tl.load(values + at, mask=loaded, other=0.0)
        sums = sums * fade[:, None] + tl.dot(p.to(value.dtype), value, input_precision=PRECISION)
        total = total * fade + tl.sum(p, 1)
        highest = higher
    if SPLITS == 1:
        y = (sums / total[:, None]).to(out.dtype.element_ty)
        tl.store(out + places[:, None] * HEAD + channels[None, :], y, mask=there)
    else:
        parts = places * SPLITS + split
        tl.store(out + parts[:, None] * HEAD + channels[None, :], sums, mask=there)
        tl.store(largest + parts, highest, mask=queries < GROUP)
        tl.store(totals + parts, total, mask=queries < GROUP)


@triton.jit
def add_parts(parts, largest, totals, out, HEAD: tl.constexpr, WIDTH: tl.constexpr, SPLITS: tl.constexpr):
    """Write the output of one query from those over the parts of its keys."""
    query = tl.program_id(0).to(tl.int64)
    splits, channels = query * SPLITS + tl.arange(0, SPLITS), tl.arange(0, WIDTH)
    top = tl.load(largest + splits)
    share = tl.exp2(top - tl.max(top, 0))
    there = channels[None, :] < HEAD
    sums = tl.load(parts + splits[:, None] * HEAD + channels[None, :], mask=there, other=0.0)
    total = tl.sum(share * tl.load(totals + splits), 0)
    y = tl.sum(share[:, None] * sums, 0) / total
    tl.store(out + query * HEAD + channels, y.to(out.dtype.element_ty), mask=channels < HEAD)
