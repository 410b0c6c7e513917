"""What passes keep for their backward passes on one rank, and how many are under way at once.

Sizes are counted, not measured: each function states what is kept and by whom, so that a reader can check it against
the code it describes. Symbols: T slots of a micro-batch in a pass, H hidden size, F feed-forward width, t tensor ranks,
b bytes of an activation.
"""

from dataclasses import dataclass

from megatron_ponder.config.run import RecomputeKind
from megatron_ponder.estimates.rank import FP32, Rank, slots_of_passes
from megatron_ponder.model.modes.pondering import Shape
from megatron_ponder.model.modes.ponderlm import candidates
from megatron_ponder.parallel.pipeline import packed_size

INT64 = 8


@dataclass(frozen=True)
class Pass:
    """One pass of one micro-batch, on one rank.

    Attributes:
        slots: T, of B sequences.
        kept: those that the last block of the stack finishes.
        received: bytes that the pass before has handed over through a pipeline.
        sent: bytes that go on to the next rank of a pipeline, or to the next pass.
        weighted: keys have weights.
        final: its hidden states are the output.
        predicts: it ends in a prediction that the next pass reads.
        reads: it reads predictions.
        routes: the router reads its first slots.
        read_later: later passes see its keys and values.
        recompute: as in `training.recompute`.
    """

    slots: int
    kept: int
    received: int
    sent: int
    weighted: bool
    final: bool
    predicts: bool
    reads: bool
    routes: bool
    read_later: bool
    recompute: RecomputeKind


def passes(rank: Rank) -> list[Pass]:
    """The passes that keep anything for a backward pass, in order."""
    plan, chain, sizes = rank.plan, rank.chain, rank.sizes
    handed = [_packed_bytes(rank, chain.state_shapes(sizes, index, plan)) for index in range(len(plan) - 1)]
    result = []
    for index, (run, kept) in enumerate(slots_of_passes(rank.config, rank.refinements)):
        final = index == len(plan) - 1
        passed_on = _packed_bytes(rank, chain.stream_shapes(sizes, index, plan))
        result.append(
            Pass(
                slots=rank.tokens * run,
                kept=rank.tokens * kept,
                received=handed[index - 1] if rank.first and index > 0 else 0,
                sent=passed_on if not rank.last else 0 if final else handed[index],
                weighted=chain.routed and index > 0,
                final=final,
                predicts=chain.predicts and not final,
                reads=chain.predicts and index > 0,
                routes=chain.routed and not (rank.once and index > 0),
                read_later=rank.once and not final,
                recompute=rank.recompute.of_pass(index),
            )
        )
    trained = rank.config.ponder_training.gradient_passes
    return result if trained is None else result[-trained:]


def _packed_bytes(rank: Rank, shapes: tuple[Shape, Shape | None]) -> int:
    return packed_size(*shapes, rank.dtype) * rank.width


def attention_bytes(rank: Rank, p: Pass, kept: int) -> float:
    """q, k, v and what the kernel and the output projection need.

    T b (q + k + v + output), and one statistic a query and head. The projection keeps its input, kept H/t b, which is
    the kernel's output unless channels or slots are cut from it, or it goes to other context ranks. A kernel with w on
    the side of values has these twice. With sequence parallelism T H b, the gathered input. Norms of queries and keys
    keep these as they were, T b (q + k), and a statistic of each.
    """
    block, b = rank.part.block, rank.width
    size = p.slots * (b * sum(head_channels(rank, p)) + FP32 * block.query_heads)
    size += p.slots * (b * block.normed + FP32 * block.normed_heads)
    further = p.weighted and rank.attention.carried
    if further in ("channels", "values") or kept < p.slots or rank.axes["context"] > 1:
        size += kept * b * block.query
    if further == "values":
        size += p.slots * b * block.key
    return size + (p.slots * b * block.hidden if rank.tensor.sequence_parallel else 0)


def head_channels(rank: Rank, p: Pass) -> tuple[int, int, int, int]:
    """Channels of a slot's queries, keys, values and outputs in the kernel, on one tensor rank.

    Of context ranks each has all slots of a share of the heads, which are as many channels; heads of keys and values
    that there are too few of are repeated.
    """
    block = rank.part.block
    of_queries, of_values = rank.attention.channels(block.query // block.query_heads, p.weighted)
    heads, key_heads = block.query_heads, block.key_heads * rank.key_repeats
    return heads * of_queries, key_heads * of_queries, key_heads * of_values, heads * of_values


def feed_forward_bytes(rank: Rank, p: Pass, kept: int) -> float:
    """What its first products put out, and the norm's input; with sequence parallelism the gathered input.

    A parallel residual shares its input with attention unless slots are cut from it.
    """
    block, b = rank.part.block, rank.width
    shared = block.shares_input and kept == p.slots
    size = kept * b * block.expanded + rank.residual(kept) * _norm_bytes(rank, 0 if shared else 1)
    return size + (kept * b * block.hidden if rank.tensor.sequence_parallel else 0)


def _norm_bytes(rank: Rank, inputs: int = 1) -> int:
    """What a norm keeps of a slot: its input and its statistics."""
    return inputs * rank.part.block.hidden * rank.width + FP32 * rank.part.block.norm_statistics


def block_bytes(rank: Rank, p: Pass, kept: int, recompute: RecomputeKind) -> float:
    """Input of the first norm, attention and feed-forward; what is recomputed keeps the block's input alone, T H b.

    And keys and values, T b (k + v), if slots of later passes see them.
    """
    inputs = rank.residual(p.slots) * rank.part.block.hidden * rank.width
    inputs += p.slots * rank.width * sum(head_channels(rank, p)[1:3]) * p.read_later
    if recompute == "block":
        return inputs
    if recompute == "attention":
        return inputs + feed_forward_bytes(rank, p, kept)
    norm = rank.residual(p.slots) * _norm_bytes(rank)
    return norm + attention_bytes(rank, p, kept) + feed_forward_bytes(rank, p, kept)


def pass_bytes(rank: Rank, p: Pass) -> float:
    """Blocks, in the last part the final norm and what reads it, and with a pipeline what is received and sent."""
    size = (len(rank.layers) - 1) * block_bytes(rank, p, p.slots, p.recompute)
    size += block_bytes(rank, p, p.kept if rank.last else p.slots, p.recompute)
    if rank.last:
        size += _end_bytes(rank, p)
    if rank.axes["pipeline"] > 1:
        size += p.sent + p.received
    return size + prediction_bytes(rank, p)


def _end_bytes(rank: Rank, p: Pass) -> float:
    """The final norm; the router's fp32 input, a view of the norm's output or a copy of the first slots; the head's.

    Where the latent scale is learned, its gradient needs the norm's output too, which pipelines count as received.
    Passes of one slot a token keep for the fusion of all slots a copy of each; what the router reads enters the next
    pass where the scale is 1.
    """
    b, hidden, kept, scale = rank.width, rank.part.block.hidden, rank.residual(p.kept), rank.config.ponder.latent_scale
    size = kept * _norm_bytes(rank)
    views = p.routes and b == FP32 and not (rank.once and scale == 1)
    scales = scale == "learned" and not p.final and rank.axes["pipeline"] == 1
    if p.routes and b < FP32:
        size += rank.residual(rank.tokens) * hidden * FP32
    if rank.part.router and rank.once:
        size += kept * hidden * b
    elif rank.part.router and p.final and b < FP32:
        size += kept * hidden * b  # for the gradient of the fusion
    size += kept * hidden * b if views or scales else 0
    return size + (rank.tokens * hidden * b if p.final or p.predicts else 0)


def prediction_bytes(rank: Rank, p: Pass) -> float:
    """Bytes of n likeliest tokens: places 8 n (16 n on tensor ranks), probabilities 4 n; to mix them, 8 n and b n."""
    numbers = rank.tokens * candidates(rank.config.model.vocab_size)
    size = numbers * ((INT64 if rank.tensor.size == 1 else 2 * INT64) + FP32) * (p.predicts and rank.last)
    return size + numbers * (INT64 + rank.width) * (p.reads and rank.first)


def most_in_flight(rank: Rank, sizes: list[float]) -> float:
    """The most that a rank of a pipeline keeps at once, if a forward pass keeps `sizes` by pass until its backward.

    In interleaved 1F1B, rank p of P runs (passes - 1) m + 2 (P - 1 - p) forwards, m micro-batches a round, before
    forwards and backwards alternate, so that min(M passes, (passes - 1) m + 2 (P - 1 - p) + 1) are in flight. The
    zero-bubble schedule warms up with P - 1 - p instead, and frees what gradients of weights need p backwards later.
    """
    ranks, count, number = rank.axes["pipeline"], rank.micro_batches, len(sizes)
    zero_bubble = rank.config.parallel.pipeline_schedule == "zero_bubble"
    per_round = count // max(1, count // ranks)
    hops = ranks - 1 - rank.pipeline_rank
    ahead = (number - 1) * per_round + (hops + rank.pipeline_rank if zero_bubble else 2 * hops)
    now = most = 0.0
    for step in range(count * number):
        now += sizes[step // per_round % number]
        most = max(most, now)
        if step >= ahead:
            now -= sizes[number - 1 - (step - ahead) // per_round % number]
    return most
