"""Expected peak memory of every rank, from the configuration alone.

Sizes are counted, not measured: each function states what is kept and by whom, so that a reader can check it against
the code it describes. Symbols: B sequences of a micro-batch, L tokens, n slots a token in a pass, T = B L n slots,
H hidden size, F feed-forward width, t tensor ranks, D copies of a parameter, b bytes of an activation.
"""

from dataclasses import dataclass, fields

from megatron_ponder.checkpoint.optimizer_state import WEIGHT_BYTES
from megatron_ponder.config.deepspeed import BUCKET, overlaps_reduction, zero_stage
from megatron_ponder.estimates.activations import (
    Pass,
    attention_bytes,
    block_bytes,
    feed_forward_bytes,
    head_channels,
    most_in_flight,
    pass_bytes,
    passes,
)
from megatron_ponder.estimates.rank import FP32, Rank
from megatron_ponder.kernels.cross_entropy import chunk_rows, logit_bytes


@dataclass(frozen=True)
class RankMemory:
    """Expected memory of one rank's tensors at the moment of a step at which it needs most, in bytes.

    Libraries and the gaps between tensors come on top. On CPUs, where freed memory is kept for reuse (`prepare_cpu`),
    gaps can be half as much again.

    Attributes:
        weights: parameters in the training precision.
        gradients: sums over micro-batches, gradients on their way there, and buffers of their reduction.
        optimizer: fp32 master weights and moments.
        activations: what the backward pass needs, over all passes and micro-batches in flight.
        other: what one block or the loss needs while it is computed.
    """

    weights: float
    gradients: float
    optimizer: float
    activations: float
    other: float

    @property
    def total(self) -> float:
        """The sum of all parts."""
        return sum(getattr(self, part.name) for part in fields(self))


# What is there all the time ---------------------------------------------------------------------------------------


def weight_bytes(rank: Rank) -> float:
    """N b; at ZeRO 3 each rank's share, N b / D."""
    whole = rank.part.count * rank.width
    return whole / rank.copies if zero_stage(rank.config) == 3 else whole


def optimizer_bytes(rank: Rank) -> float:
    """Two moments and the master weights, 12 N / D; in fp32 without ZeRO the weights are the master, and 8 N.

    Of the matrices that Muon takes one moment, 4 N less.
    Nothing where they are offloaded away from the device's memory.
    """
    where = rank.config.parallel.offload_optimizer
    if where == "nvme" or (where == "cpu" and rank.device != "cpu"):
        return 0.0
    if zero_stage(rank.config) == 0:
        return float(rank.moments)
    return (WEIGHT_BYTES * rank.part.count + rank.moments) / rank.copies


# What is there for a moment ---------------------------------------------------------------------------------------


def workspace_bytes(rank: Rank, p: Pass) -> float:
    """The backward pass of one block: two gradients of the stream, 2 T H b, and the largest of three moments.

    Feed-forward: twice what it keeps (product, its gradient, those of gate and up: 4 T F/t b; without a gate 2 T F/t
    b). Attention: gradients of its output, q, k and v. Norm: in bf16 its fp32 tensors of the stream. When the last two
    begin, what feed-forward kept is gone. What is recomputed exists again, the outputs of its norms included.
    """
    block, b, slots = rank.part.block, rank.width, p.slots
    stream = rank.residual(slots) * block.hidden
    feed_forward = 2 * slots * b * block.expanded
    attention = slots * b * sum(head_channels(rank, p))
    norm = block.norm_workspace * FP32 * stream if b < FP32 else 0
    if p.recompute == "attention":
        attention += attention_bytes(rank, p, slots) + stream * b
    later = max(attention, norm) - feed_forward_bytes(rank, p, slots)
    size = max(feed_forward, later) + 2 * stream * b
    if p.recompute == "block":
        size += block_bytes(rank, p, slots, "none") + 2 * stream * b
    return max(size, logits_bytes(rank)) if p.predicts else size


def deferred_bytes(rank: Rank, p: Pass) -> float:
    """What the zero-bubble schedule keeps besides activations until it computes gradients of weights.

    Gradients of the outputs of all layers that have weights. Rank p of the pipeline defers p backward passes and runs
    one.
    """
    if rank.config.parallel.pipeline_schedule != "zero_bubble":
        return 0.0
    block = rank.part.block
    size = rank.width * (rank.residual(p.slots) * block.residual + p.slots * block.sharded)
    return (rank.pipeline_rank + 1) * len(rank.layers) * size


def loss_bytes(rank: Rank) -> float:
    """Logits of a chunk of n tokens, of this rank's part of the vocabulary: in fp32 4 n V/t, in bf16 6 n V/t.

    Of several chunks also their gradients: of what the head reads B L H b, and of the head in fp32 4 H V/t; when no
    logits are left, B L H b and b H V/t in their place, as what autograd is given.
    """
    if not rank.last:
        return 0.0
    tokens, most = rank.tokens, chunk_rows(rank.part.columns, rank.dtype)
    logits = min(tokens, most) * rank.part.columns * logit_bytes(rank.dtype)
    if tokens <= most:
        return logits
    read, table = tokens * rank.part.block.hidden * rank.width, rank.part.table
    return read + FP32 * table + max(logits, read + rank.width * table)


def logits_bytes(rank: Rank) -> float:
    """Logits of this rank's part of the vocabulary, B L V/t b, or the gradient of a prediction's."""
    return rank.tokens * rank.part.columns * rank.width


# Gradients --------------------------------------------------------------------------------------------------------


def held_gradient_bytes(rank: Rank) -> float:
    """Sums over micro-batches while others run: 4 N, from ZeRO 2 on 4 N / D.

    They exist only after the first backward pass of a step; at stage 3 always.
    """
    stage, count = zero_stage(rank.config), rank.part.count
    if stage == 3:
        return FP32 * count / rank.copies
    repeated = rank.micro_batches > 1 or rank.axes["pipeline"] > 1
    return FP32 * count / (rank.copies if stage == 2 else 1) if repeated else 0.0


def unfinished_gradient_bytes(rank: Rank) -> float:
    """Gradients of weights to which earlier passes will add, N b; autograd holds them so long.

    Without embedding and head where only the first and the last pass use them.
    None with a single pass; none with a pipeline, where each pass has a backward pass of its own.
    """
    if len(passes(rank)) == 1 or rank.axes["pipeline"] > 1:
        return 0.0
    once = not (rank.config.model.tie_embeddings or rank.chain.predicts)
    return rank.width * (rank.part.count - rank.part.table * once)


def buffer_bytes(rank: Rank) -> float:
    """Buffers that gradients are gathered in to be reduced; two where one is filled while the other is reduced.

    They are there from the first gradient of a backward pass on, at stage 3 always. A pipeline has none. On a CPU they
    take the place of the gradients that move into them, and at stage 3 what is filled of them.
    """
    stage = zero_stage(rank.config)
    if stage == 0 or rank.axes["pipeline"] > 1:
        return 0.0
    if rank.device == "cpu":
        return float(FP32 * min(BUCKET, rank.part.count)) if stage == 3 else 0.0
    number = 2 if stage < 3 and overlaps_reduction(rank.config, rank.device) else 1
    return float(number * BUCKET * (rank.width if stage == 2 else FP32))


def reduction_bytes(rank: Rank) -> float:
    """All gradients at the end of the last backward pass of a step, with copies of their reduction over data ranks.

    Without ZeRO 8 N: gradients, and one flat copy. Stages 1 and 2: gradients, in bf16 at stage 1 sums of them, 4 N,
    else N b; the share of a rank, 4 N / D, of which stage 2 has another for earlier micro-batches in fp32; a flat copy
    of a bucket, and at stage 2 in bf16 one in either type. Stage 3: 3 N b besides its share.
    """
    stage, b, count = zero_stage(rank.config), rank.width, rank.part.count
    share, buffers = FP32 * count / rank.copies, buffer_bytes(rank)
    if stage == 0:
        return 2 * FP32 * count
    if stage == 3:
        return share + 3 * count * b + buffers
    largest = max(parameter.count for parameter in rank.part.parameters)
    copied = min(max(BUCKET, largest), count)
    if stage == 1:
        return FP32 * count + share + FP32 * copied + buffers
    rounded = b if b < FP32 else 0
    return b * count + share + (FP32 + rounded) * copied + buffers + (held_gradient_bytes(rank) if not rounded else 0.0)


def update_bytes(rank: Rank) -> float:
    """What Muon needs for the largest matrix, m × n with m ≤ n: 4 m n b and 2 m² b; 2 m n b more on tensor ranks.

    The momentum, the same normed, one iteration and the next, and two products of m × m; on tensor ranks parts and what
    is made of them. 2 m n b more for the matrices that ZeRO cuts.
    """
    sizes, cut = [0.0], zero_stage(rank.config) > 0 and rank.copies > 1
    for matrix in rank.taken_whole:
        short, long = sorted(matrix.shape)
        tensors = 4 + 2 * (rank.tensor.size > 1) + 2 * cut
        sizes.append(rank.width * (tensors * short * long + 2 * short**2))
    return max(sizes)


def memory_estimate(rank: Rank) -> RankMemory:
    """Expected peak of one rank: the largest moment of a step.

    Without a pipeline: the loss, when all activations are there; the backward pass of each pass, when activations of
    later passes are gone and gradients of weights are there instead; the reduction; the update. With one: the fullest
    moment of the schedule, the reduction, or the update.
    """
    updated = FP32 * rank.part.count / (rank.copies if zero_stage(rank.config) else 1)
    moments = [*running_moments(rank), (reduction_bytes(rank), 0.0, 0.0), (updated, 0.0, update_bytes(rank))]
    gradients, activations, other = max(moments, key=sum)
    return RankMemory(weight_bytes(rank), gradients, optimizer_bytes(rank), activations, other)


def running_moments(rank: Rank) -> list[tuple[float, float, float]]:
    """Gradients, activations and other memory at the moments of forward and backward passes that may need most.

    At ZeRO 3 forward passes gather the parameters, N b, and the backward pass lets them go as it proceeds.
    """
    sizes = [pass_bytes(rank, p) for p in passes(rank)]
    spaces = [workspace_bytes(rank, p) for p in passes(rank)]
    held, loss = held_gradient_bytes(rank), loss_bytes(rank)
    held += buffer_bytes(rank)
    if rank.axes["pipeline"] > 1:
        deferred = max(deferred_bytes(rank, p) for p in passes(rank))
        return [(held, most_in_flight(rank, sizes), deferred + max(*spaces, loss))]
    head = rank.part.table * rank.width
    unfinished = held + unfinished_gradient_bytes(rank)
    moments = [(unfinished, sum(sizes[:end]), spaces[end - 1]) for end in range(1, len(sizes))]
    gathered = rank.part.count * rank.width if zero_stage(rank.config) == 3 else 0.0
    return [*moments, (held + head, sum(sizes), spaces[-1] + gathered), (held, sum(sizes), loss + gathered)]
