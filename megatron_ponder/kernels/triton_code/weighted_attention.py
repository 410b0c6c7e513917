"""Causal attention with key weights, forward and backward, in blocks of queries and keys.

Rows of T slots lie one behind the other: slot t of row b and head n begins at ((b · T + t) · heads + n) · HEAD. Logits
are in units of log 2, in fp32, and log w is added to them there. Every number is written by one program and summed in
one order, so that results repeat bit by bit. Outputs of the backward pass: of queries by blocks of queries, which also
leave Σ_d out · grad for the other; of keys, values and log w by blocks of keys, over all queries that see them.

A block of queries meets keys in three runs: those before the last of its segments begins and, on the diagonal, those
up to its own last query, where a mask decides; and between these the keys that all of its queries see. Blocks of keys
meet queries likewise.
"""

import triton
import triton.language as tl

LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)
# Below all logits, and finite: differences of two are not NaN.
LOWEST: tl.constexpr = tl.constexpr(-1e30)


@triton.jit
def _load(x, slots, head, heads, length, HEAD: tl.constexpr, WIDTH: tl.constexpr, EXIST: tl.constexpr):
    """All channels of some slots of a row, padded with zeros; no slot is beyond the last where all `EXIST`."""
    channels = tl.arange(0, WIDTH)
    pointers = x + (slots[:, None] * heads + head) * HEAD + channels[None, :]
    if EXIST and HEAD == WIDTH:
        return tl.load(pointers)
    elif EXIST:
        return tl.load(pointers, mask=channels[None, :] < HEAD, other=0.0)
    else:
        return tl.load(pointers, mask=(slots[:, None] < length) & (channels[None, :] < HEAD), other=0.0)


@triton.jit
def _numbers(x, slots, length, EXIST: tl.constexpr):
    """One number for each of some slots of a row."""
    if EXIST:
        return tl.load(x + slots)
    else:
        return tl.load(x + slots, mask=slots < length, other=0.0)


@triton.jit
def _store(x, values, slots, head, heads, length, HEAD: tl.constexpr, WIDTH: tl.constexpr):
    """Write what `_load` reads, in the type of `x`."""
    channels = tl.arange(0, WIDTH)
    pointers = x + (slots[:, None] * heads + head) * HEAD + channels[None, :]
    there = (slots[:, None] < length) & (channels[None, :] < HEAD)
    tl.store(pointers, values.to(x.dtype.element_ty), mask=there)


@triton.jit
def _forward_run(
    total, largest, out, q, K, V, LOG_W, queries, starts, begin, end, head, heads, length, factor,
    HEAD: tl.constexpr, WIDTH: tl.constexpr, KEYS: tl.constexpr, WEIGHTED: tl.constexpr, SEGMENTED: tl.constexpr,
    MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add a run of keys to the sums of exponentials and of weighted values, and to the largest logits."""
    for first in range(begin, end, KEYS):
        keys = first + tl.arange(0, KEYS)
        k = _load(K, keys, head, heads, length, HEAD, WIDTH, not MASKED)
        logits = tl.dot(q, tl.trans(k), input_precision=PRECISION) * factor
        if WEIGHTED:
            logits += (_numbers(LOG_W, keys, length, not MASKED) * LOG2_E)[None, :]
        if MASKED:
            seen = keys[None, :] <= queries[:, None]
            if SEGMENTED:
                seen = seen & (keys[None, :] >= starts[:, None])
            logits = tl.where(seen, logits, float("-inf"))
        larger = tl.maximum(largest, tl.max(logits, 1))
        p = tl.exp2(logits - larger[:, None])
        shrink = tl.exp2(largest - larger)
        v = _load(V, keys, head, heads, length, HEAD, WIDTH, not MASKED)
        out = tl.dot(p.to(v.dtype), v, out * shrink[:, None], input_precision=PRECISION)
        total = total * shrink + tl.sum(p, 1)
        largest = larger
    return total, largest, out


@triton.jit
def forward(
    Q, K, V, LOG_W, STARTS, OUT, LOG_SUMS, factor, length, heads,
    GROUP: tl.constexpr, HEAD: tl.constexpr, WIDTH: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
    WEIGHTED: tl.constexpr, SEGMENTED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The output and the log of every query's sum of exponentials; programs: blocks of queries × rows and heads."""
    block = tl.num_programs(0) - 1 - tl.program_id(0)  # those of most keys first
    row, head = (tl.program_id(1) // heads).to(tl.int64), tl.program_id(1) % heads
    of_q, of_k, kv_heads = row * length * heads * HEAD, row * length * (heads // GROUP) * HEAD, heads // GROUP
    queries = block * QUERIES + tl.arange(0, QUERIES)
    q = _load(Q + of_q, queries, head, heads, length, HEAD, WIDTH, False)
    starts = queries
    all_see = block * QUERIES // KEYS * KEYS
    run, begin = 0, 0
    if SEGMENTED:
        starts = tl.load(STARTS + tl.minimum(queries, length - 1))
        begin = tl.min(starts) // KEYS * KEYS
        run = tl.minimum(tl.cdiv(tl.max(starts), KEYS) * KEYS, all_see)
    total = tl.zeros([QUERIES], tl.float32)
    largest = tl.full([QUERIES], LOWEST, tl.float32)
    out = tl.zeros([QUERIES, WIDTH], tl.float32)
    if SEGMENTED:
        total, largest, out = _forward_run(
            total, largest, out, q, K + of_k, V + of_k, LOG_W + row * length, queries, starts, begin, run,
            head // GROUP, kv_heads, length, factor, HEAD, WIDTH, KEYS, WEIGHTED, SEGMENTED, True, PRECISION,
        )  # fmt: skip
    total, largest, out = _forward_run(
        total, largest, out, q, K + of_k, V + of_k, LOG_W + row * length, queries, starts, run, all_see,
        head // GROUP, kv_heads, length, factor, HEAD, WIDTH, KEYS, WEIGHTED, SEGMENTED, False, PRECISION,
    )  # fmt: skip
    total, largest, out = _forward_run(
        total, largest, out, q, K + of_k, V + of_k, LOG_W + row * length, queries, starts,
        tl.maximum(all_see, begin), tl.minimum((block + 1) * QUERIES, length),
        head // GROUP, kv_heads, length, factor, HEAD, WIDTH, KEYS, WEIGHTED, SEGMENTED, True, PRECISION,
    )  # fmt: skip
    _store(OUT + of_q, out / total[:, None], queries, head, heads, length, HEAD, WIDTH)
    of_sums = LOG_SUMS + tl.program_id(1).to(tl.int64) * length
    tl.store(of_sums + queries, largest + tl.log2(total), mask=queries < length)


@triton.jit
def _queries_run(
    grad_q, q, grad, log_sums, products, K, V, LOG_W, queries, starts, begin, end, head, heads, length, factor,
    HEAD: tl.constexpr, WIDTH: tl.constexpr, KEYS: tl.constexpr, WEIGHTED: tl.constexpr, SEGMENTED: tl.constexpr,
    MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add what a run of keys gives to the gradient of queries."""
    for first in range(begin, end, KEYS):
        keys = first + tl.arange(0, KEYS)
        k = _load(K, keys, head, heads, length, HEAD, WIDTH, not MASKED)
        v = _load(V, keys, head, heads, length, HEAD, WIDTH, not MASKED)
        logits = tl.dot(q, tl.trans(k), input_precision=PRECISION) * factor
        if WEIGHTED:
            logits += (_numbers(LOG_W, keys, length, not MASKED) * LOG2_E)[None, :]
        if MASKED:
            seen = keys[None, :] <= queries[:, None]
            if SEGMENTED:
                seen = seen & (keys[None, :] >= starts[:, None])
            logits = tl.where(seen, logits, float("-inf"))
        p = tl.exp2(logits - log_sums[:, None])
        of_p = tl.dot(grad, tl.trans(v), input_precision=PRECISION)
        of_logits = p * (of_p - products[:, None])
        grad_q = tl.dot(of_logits.to(k.dtype), k, grad_q, input_precision=PRECISION)
    return grad_q


@triton.jit
def backward_queries(
    Q, K, V, LOG_W, STARTS, OUT, LOG_SUMS, GRAD, GRAD_Q, PRODUCTS, factor, scale, length, heads,
    GROUP: tl.constexpr, HEAD: tl.constexpr, WIDTH: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
    WEIGHTED: tl.constexpr, SEGMENTED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradient of queries, and Σ_d out · grad of each; programs as in `forward`."""
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    row, head = (tl.program_id(1) // heads).to(tl.int64), tl.program_id(1) % heads
    of_q, of_k, kv_heads = row * length * heads * HEAD, row * length * (heads // GROUP) * HEAD, heads // GROUP
    of_sums = tl.program_id(1).to(tl.int64) * length
    queries = block * QUERIES + tl.arange(0, QUERIES)
    out = _load(OUT + of_q, queries, head, heads, length, HEAD, WIDTH, False)
    grad = _load(GRAD + of_q, queries, head, heads, length, HEAD, WIDTH, False)
    products = tl.sum(out.to(tl.float32) * grad.to(tl.float32), 1)
    tl.store(PRODUCTS + of_sums + queries, products, mask=queries < length)
    log_sums = tl.load(LOG_SUMS + of_sums + queries, mask=queries < length, other=0.0)
    q = _load(Q + of_q, queries, head, heads, length, HEAD, WIDTH, False)
    starts = queries
    all_see = block * QUERIES // KEYS * KEYS
    run, begin = 0, 0
    if SEGMENTED:
        starts = tl.load(STARTS + tl.minimum(queries, length - 1))
        begin = tl.min(starts) // KEYS * KEYS
        run = tl.minimum(tl.cdiv(tl.max(starts), KEYS) * KEYS, all_see)
    grad_q = tl.zeros([QUERIES, WIDTH], tl.float32)
    if SEGMENTED:
        grad_q = _queries_run(
            grad_q, q, grad, log_sums, products, K + of_k, V + of_k, LOG_W + row * length, queries, starts, begin, run,
            head // GROUP, kv_heads, length, factor, HEAD, WIDTH, KEYS, WEIGHTED, SEGMENTED, True, PRECISION,
        )  # fmt: skip
    grad_q = _queries_run(
        grad_q, q, grad, log_sums, products, K + of_k, V + of_k, LOG_W + row * length, queries, starts, run, all_see,
        head // GROUP, kv_heads, length, factor, HEAD, WIDTH, KEYS, WEIGHTED, SEGMENTED, False, PRECISION,
    )  # fmt: skip
    grad_q = _queries_run(
        grad_q, q, grad, log_sums, products, K + of_k, V + of_k, LOG_W + row * length, queries, starts,
        tl.maximum(all_see, begin), tl.minimum((block + 1) * QUERIES, length),
        head // GROUP, kv_heads, length, factor, HEAD, WIDTH, KEYS, WEIGHTED, SEGMENTED, True, PRECISION,
    )  # fmt: skip
    _store(GRAD_Q + of_q, grad_q * scale, queries, head, heads, length, HEAD, WIDTH)


@triton.jit
def _keys_run(
    grad_k, grad_v, grad_w, k, v, log_w, keys, Q, GRAD, STARTS, LOG_SUMS, PRODUCTS, begin, end, head, heads, length,
    factor, HEAD: tl.constexpr, WIDTH: tl.constexpr, QUERIES: tl.constexpr, SEGMENTED: tl.constexpr,
    MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add what a run of queries gives to the gradients of keys, values and log w; queries beyond the last give 0."""
    for first in range(begin, end, QUERIES):
        queries = first + tl.arange(0, QUERIES)
        q = _load(Q, queries, head, heads, length, HEAD, WIDTH, not MASKED)
        grad = _load(GRAD, queries, head, heads, length, HEAD, WIDTH, not MASKED)
        log_sums = _numbers(LOG_SUMS, queries, length, not MASKED)
        products = _numbers(PRODUCTS, queries, length, not MASKED)
        logits = tl.dot(k, tl.trans(q), input_precision=PRECISION) * factor + log_w[:, None]
        if MASKED:
            seen = keys[:, None] <= queries[None, :]
            if SEGMENTED:
                starts = tl.load(STARTS + queries, mask=queries < length, other=0)
                seen = seen & (keys[:, None] >= starts[None, :])
            logits = tl.where(seen, logits, float("-inf"))
        p = tl.exp2(logits - log_sums[None, :])
        grad_v = tl.dot(p.to(grad.dtype), grad, grad_v, input_precision=PRECISION)
        of_p = tl.dot(v, tl.trans(grad), input_precision=PRECISION)
        of_logits = p * (of_p - products[None, :])
        grad_k = tl.dot(of_logits.to(q.dtype), q, grad_k, input_precision=PRECISION)
        grad_w += tl.sum(of_logits, 1)
    return grad_k, grad_v, grad_w


@triton.jit
def backward_keys(
    Q, K, V, LOG_W, STARTS, ENDS, LOG_SUMS, PRODUCTS, GRAD, GRAD_K, GRAD_V, GRAD_W, factor, scale, length, kv_heads,
    GROUP: tl.constexpr, HEAD: tl.constexpr, WIDTH: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
    WEIGHTED: tl.constexpr, SEGMENTED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of keys and values, and of log w by head; programs: blocks of keys × rows and heads of keys."""
    block, heads = tl.program_id(0), kv_heads * GROUP
    row, kv_head = (tl.program_id(1) // kv_heads).to(tl.int64), tl.program_id(1) % kv_heads
    of_q, of_k = row * length * heads * HEAD, row * length * kv_heads * HEAD
    keys = block * KEYS + tl.arange(0, KEYS)
    k = _load(K + of_k, keys, kv_head, kv_heads, length, HEAD, WIDTH, False)
    v = _load(V + of_k, keys, kv_head, kv_heads, length, HEAD, WIDTH, False)
    log_w = tl.zeros([KEYS], tl.float32)
    if WEIGHTED:
        log_w = tl.load(LOG_W + row * length + keys, mask=keys < length, other=0.0) * LOG2_E
    begin = block * KEYS // QUERIES * QUERIES
    all_seen = tl.cdiv((block + 1) * KEYS, QUERIES) * QUERIES
    see_all, end = length, length
    if SEGMENTED:
        see_all = tl.load(ENDS + block * KEYS)
        end = tl.load(ENDS + tl.minimum((block + 1) * KEYS, length) - 1)
    run = tl.maximum(see_all // QUERIES * QUERIES, all_seen)
    grad_k = tl.zeros([KEYS, WIDTH], tl.float32)
    grad_v = tl.zeros([KEYS, WIDTH], tl.float32)
    grad_w = tl.zeros([KEYS], tl.float32)
    for member in range(GROUP):
        head = kv_head * GROUP + member
        of_sums = (row * heads + head) * length
        grad_k, grad_v, grad_w = _keys_run(
            grad_k, grad_v, grad_w, k, v, log_w, keys, Q + of_q, GRAD + of_q, STARTS, LOG_SUMS + of_sums,
            PRODUCTS + of_sums, begin, tl.minimum(all_seen, end), head, heads, length, factor,
            HEAD, WIDTH, QUERIES, SEGMENTED, True, PRECISION,
        )  # fmt: skip
        grad_k, grad_v, grad_w = _keys_run(
            grad_k, grad_v, grad_w, k, v, log_w, keys, Q + of_q, GRAD + of_q, STARTS, LOG_SUMS + of_sums,
            PRODUCTS + of_sums, all_seen, run, head, heads, length, factor,
            HEAD, WIDTH, QUERIES, SEGMENTED, False, PRECISION,
        )  # fmt: skip
        grad_k, grad_v, grad_w = _keys_run(
            grad_k, grad_v, grad_w, k, v, log_w, keys, Q + of_q, GRAD + of_q, STARTS, LOG_SUMS + of_sums,
            PRODUCTS + of_sums, run, end, head, heads, length, factor,
            HEAD, WIDTH, QUERIES, SEGMENTED, True, PRECISION,
        )  # fmt: skip
    _store(GRAD_K + of_k, grad_k * scale, keys, kv_head, kv_heads, length, HEAD, WIDTH)
    _store(GRAD_V + of_k, grad_v, keys, kv_head, kv_heads, length, HEAD, WIDTH)
    if WEIGHTED:
        tl.store(GRAD_W + tl.program_id(1).to(tl.int64) * length + keys, grad_w, mask=keys < length)
