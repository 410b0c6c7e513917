"""Expected peak memory of every rank, from the configuration alone.

Sizes are counted, not measured: each function states what is kept and by whom, so that a reader can check it against
the code it describes. Symbols: B sequences of a micro-batch, L tokens, n slots a token in a pass, T = B L n slots,
H hidden size, F feed-forward width, t tensor ranks, D data-parallel ranks, b bytes of an activation.
"""

from dataclasses import dataclass, fields

import torch

from megatron_ponder.checkpoint.optimizer_state import WEIGHT_BYTES, moment_bytes
from megatron_ponder.config.deepspeed import zero_stage
from megatron_ponder.estimates.rank import FP32, Rank, rank_parameters, vocabulary_parameters
from megatron_ponder.kernels.attention import FOLDED_CHANNELS
from megatron_ponder.model.baselines import CANDIDATES
from megatron_ponder.model.passes import Shape
from megatron_ponder.parallel.pipeline import packed_size

INT64 = 8


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
    whole = rank_parameters(rank) * rank.width
    return whole / rank.data if zero_stage(rank.config) == 3 else whole


def optimizer_bytes(rank: Rank) -> float:
    """Two moments and the master weights, 12 N / D; in fp32 without ZeRO the weights are the master, and 8 N.

    Nothing where they are offloaded away from the device's memory.
    """
    where = rank.config.parallel.offload_optimizer
    if where == "nvme" or (where == "cpu" and rank.device != "cpu"):
        return 0.0
    count, moments = rank_parameters(rank), moment_bytes(rank.config.optimizer)
    return moments * count if zero_stage(rank.config) == 0 else (WEIGHT_BYTES + moments) * count / rank.data


# Activations ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pass:
    """One pass of one micro-batch, on one rank.

    Attributes:
        slots: T, of B sequences.
        kept: those that the last block of the stack finishes.
        received: bytes that the pass before has handed over through a pipeline.
        sent: bytes that go on to the next rank of a pipeline, or to the next pass.
        folded: keys carry log w in further channels.
        final: its hidden states are the output.
        predicts: it ends in a prediction that the next pass reads.
        reads: it reads predictions.
        recompute: as in `training.recompute`.
    """

    slots: int
    kept: int
    received: int
    sent: int
    folded: bool
    final: bool
    predicts: bool
    reads: bool
    recompute: str


def passes(rank: Rank) -> list[Pass]:
    """The passes that keep anything for a backward pass, in order."""
    training, plan, chain = rank.config.training, rank.plan, rank.chain
    tokens, sizes = training.micro_batch_size * rank.config.data.sequence_length, rank.sizes
    handed = [_packed_bytes(rank, chain.state_shapes(sizes, index, plan)) for index in range(len(plan) - 1)]
    result = []
    for index, slots in enumerate(plan):
        final = index == len(plan) - 1
        again = training.recompute_passes is None or index < training.recompute_passes
        passed_on = _packed_bytes(rank, chain.stream_shapes(sizes, index, plan))
        result.append(
            Pass(
                slots=tokens * slots,
                kept=tokens * len(range(slots)[chain.kept(index, plan)]),
                received=handed[index - 1] if rank.first and index > 0 else 0,
                sent=passed_on if not rank.last else 0 if final else handed[index],
                folded=chain.routed and index > 0,
                final=final,
                predicts=chain.predicts and not final,
                reads=chain.predicts and index > 0,
                recompute=training.recompute if again else "none",
            )
        )
    trained = rank.config.ponder_training.gradient_passes
    return result if trained is None else result[-trained:]


def _packed_bytes(rank: Rank, shapes: tuple[Shape, Shape | None]) -> int:
    return packed_size(*shapes, torch.bfloat16 if rank.width < FP32 else torch.float32) * rank.width


def attention_bytes(rank: Rank, p: Pass, kept: int) -> float:
    """q, k, v and what the kernel and the output projection need.

    T b (q + k + v + output), one statistic a query and head, and a mask if there is one. The projection keeps its
    input, kept H/t b, which is the kernel's output unless channels or slots are cut from it. With sequence parallelism
    T H b, the gathered input.
    """
    model, t, b = rank.config.model, rank.config.parallel.tensor, rank.width
    query, key = _head_channels(rank, p)
    size = p.slots * (b * 2 * (query + key) + FP32 * model.num_heads // t)
    if p.folded or kept < p.slots:
        size += kept * b * model.hidden_size // t
    if rank.config.data.reset_at_eod:
        size += b * p.slots**2 / rank.config.training.micro_batch_size
    return size + (p.slots * b * model.hidden_size if rank.config.parallel.sequence_parallel else 0)


def _head_channels(rank: Rank, p: Pass) -> tuple[float, float]:
    """Channels of a slot's queries, and of its keys or values, on one tensor rank."""
    model, t = rank.config.model, rank.config.parallel.tensor
    size = model.head_size + (FOLDED_CHANNELS if p.folded else 0)
    return model.num_heads // t * size, model.num_kv_heads // t * size


def feed_forward_bytes(rank: Rank, p: Pass, kept: int) -> float:
    """Gate and up, or up alone, kept F/t b each; the norm's input; with sequence parallelism the gathered input.

    A parallel residual shares its input with attention unless slots are cut from it.
    """
    model, parallel, b = rank.config.model, rank.config.parallel, rank.width
    llama = model.family == "llama"
    shared = model.residual == "parallel" and kept == p.slots
    size = kept * b * model.ffn_hidden_size // parallel.tensor * (2 if llama else 1)
    size += rank.residual(kept) * _norm_bytes(rank, 0 if shared else 1)
    return size + (kept * b * model.hidden_size if parallel.sequence_parallel else 0)


def _norm_bytes(rank: Rank, inputs: int = 1) -> int:
    """What a norm keeps of a slot: its input and one statistic or two."""
    return inputs * rank.config.model.hidden_size * rank.width + FP32 * (
        1 if rank.config.model.family == "llama" else 2
    )


def block_bytes(rank: Rank, p: Pass, kept: int, recompute: str) -> float:
    """Input of the first norm, attention and feed-forward; what is recomputed keeps the block's input alone, T H b."""
    inputs = rank.residual(p.slots) * rank.config.model.hidden_size * rank.width
    if recompute == "block":
        return inputs
    if recompute == "attention":
        return inputs + feed_forward_bytes(rank, p, kept)
    norm = rank.residual(p.slots) * _norm_bytes(rank)
    return norm + attention_bytes(rank, p, kept) + feed_forward_bytes(rank, p, kept)


def pass_bytes(rank: Rank, p: Pass) -> float:
    """Blocks, in the last part the final norm and what reads it, and with a pipeline what is received and sent."""
    config, b, hidden = rank.config, rank.width, rank.config.model.hidden_size
    tokens = config.training.micro_batch_size * config.data.sequence_length
    count, kept = len(rank.layers), rank.residual(p.kept)
    size = (count - 1) * block_bytes(rank, p, p.slots, p.recompute)
    size += block_bytes(rank, p, p.kept if rank.last else p.slots, p.recompute)
    if rank.last:
        size += kept * _norm_bytes(rank)
        if rank.chain.routed:
            # the router's fp32 input: a view of the norm's output, or a copy of the first slots
            size += kept * hidden * b if b == FP32 else rank.residual(tokens) * hidden * FP32
            size += kept * hidden * b if p.final and b < FP32 else 0  # for the gradient of the fusion
        size += tokens * hidden * b if p.final or p.predicts else 0  # the head's input
    if config.parallel.pipeline > 1:
        size += p.sent + p.received
    return size + prediction_bytes(rank, p)


def prediction_bytes(rank: Rank, p: Pass) -> float:
    """Bytes of n likeliest tokens: places 8 n (16 n on tensor ranks), probabilities 4 n; to mix them, 8 n and b n."""
    config = rank.config
    tokens = config.training.micro_batch_size * config.data.sequence_length
    count = min(CANDIDATES, config.model.vocab_size)
    size = tokens * count * ((INT64 if config.parallel.tensor == 1 else 2 * INT64) + FP32) * (p.predicts and rank.last)
    return size + tokens * count * (INT64 + rank.width) * (p.reads and rank.first)


def most_in_flight(rank: Rank, sizes: list[float]) -> float:
    """The most that a rank of a pipeline keeps at once, if a forward pass keeps `sizes` by pass until its backward.

    In interleaved 1F1B, rank p of P runs (passes - 1) m + 2 (P - 1 - p) forwards, m micro-batches a round, before
    forwards and backwards alternate, so that min(M passes, (passes - 1) m + 2 (P - 1 - p) + 1) are in flight. The
    zero-bubble schedule warms up with P - 1 - p instead, and frees what gradients of weights need p backwards later.
    """
    ranks, count, number = rank.config.parallel.pipeline, rank.micro_batches, len(sizes)
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


# What is there for a moment ---------------------------------------------------------------------------------------


def workspace_bytes(rank: Rank, p: Pass) -> float:
    """The backward pass of one block: two gradients of the stream, 2 T H b, and the largest of three moments.

    Feed-forward: 4 T F/t b (product, its gradient, those of gate and up) or 2 T F/t b. Attention: gradients of its
    output, q, k and v. RMSNorm: in bf16 four fp32 tensors of the stream. When the last two begin, what feed-forward
    kept is gone. What is recomputed exists again, the outputs of its norms included.
    """
    model, t, b = rank.config.model, rank.config.parallel.tensor, rank.width
    query, key = _head_channels(rank, p)
    llama, slots, stream = model.family == "llama", p.slots, rank.residual(p.slots) * model.hidden_size
    feed_forward = (4 if llama else 2) * slots * b * model.ffn_hidden_size // t
    attention = slots * b * 2 * (query + key)
    if p.recompute == "attention":
        attention += attention_bytes(rank, p, slots) + stream * b
    later = max(attention, 4 * FP32 * stream if llama and b < FP32 else 0) - feed_forward_bytes(rank, p, slots)
    size = max(feed_forward, later) + 2 * stream * b
    if p.recompute == "block":
        size += block_bytes(rank, p, slots, "none") + 2 * stream * b
    return max(size, logits_bytes(rank)) if p.predicts else size


def deferred_bytes(rank: Rank, p: Pass) -> float:
    """What the zero-bubble schedule keeps besides activations until it computes gradients of weights.

    Gradients of the outputs of all layers that have weights: T b (4 H + (H + 2 kv)/t + 2 F/t) a block, or 1 F/t, the
    first term in the residual stream. Rank p of the pipeline defers p backward passes and runs one.
    """
    parallel, model, b = rank.config.parallel, rank.config.model, rank.width
    if parallel.pipeline_schedule != "zero_bubble":
        return 0.0
    kv = model.num_kv_heads * model.head_size
    sharded = model.hidden_size + 2 * kv + (2 if model.family == "llama" else 1) * model.ffn_hidden_size
    block = b * (4 * rank.residual(p.slots) * model.hidden_size + p.slots * sharded // parallel.tensor)
    return (rank.pipeline_rank + 1) * len(rank.layers) * block


def loss_bytes(rank: Rank) -> float:
    """Logits of this rank's part of the vocabulary in fp32, 4 B L V/t, and in bf16 also as they are, 2 B L V/t."""
    return logits_bytes(rank) * (1 if rank.width == FP32 else (FP32 + rank.width) / rank.width)


def logits_bytes(rank: Rank) -> float:
    """Logits of this rank's part of the vocabulary, B L V/t b, or the gradient of a prediction's."""
    config = rank.config
    tokens = config.training.micro_batch_size * config.data.sequence_length
    return tokens * vocabulary_parameters(rank) / config.model.hidden_size * rank.width if rank.last else 0.0


# Gradients --------------------------------------------------------------------------------------------------------


def held_gradient_bytes(rank: Rank) -> float:
    """Sums over micro-batches while others run: 4 N, from ZeRO 2 on 4 N / D.

    In fp32, and at ZeRO 2, they exist only after the first backward pass of a step. In bf16 at stage 1 they always do,
    and from then on the last micro-batch's gradients besides, 2 N, which a pipeline adds up at once.
    """
    stage, count = zero_stage(rank.config), rank_parameters(rank)
    pipelined = rank.config.parallel.pipeline > 1
    repeated = rank.micro_batches > 1 or pipelined
    if stage == 1 and rank.width < FP32:
        return (FP32 + (rank.width if repeated and not pipelined else 0)) * count
    if stage == 3:
        return FP32 * count / rank.data
    return FP32 * count / (rank.data if stage == 2 else 1) if repeated else 0.0


def unfinished_gradient_bytes(rank: Rank) -> float:
    """Gradients of weights to which earlier passes will add, N b; autograd holds them so long.

    Without embedding and head where only the first and the last pass use them.
    None with a single pass; none with a pipeline, where each pass has a backward pass of its own.
    """
    if len(passes(rank)) == 1 or rank.config.parallel.pipeline > 1:
        return 0.0
    once = not (rank.config.model.tie_embeddings or rank.chain.predicts)
    return rank.width * (rank_parameters(rank) - vocabulary_parameters(rank) * once)


def reduction_bytes(rank: Rank) -> float:
    """All gradients at the end of the last backward pass of a step, with buffers of their reduction over data ranks.

    fp32: 8 N without ZeRO (gradients, and one flat copy), 4 N + 4 N / D with stages 1 and 2, of which 2 has the sums of
    earlier micro-batches besides. bf16: 12 N at stage 1 (fp32 sums 4 N, gradients 2 N, flat copies in both types), of
    which a pipeline has no gradients; 2 N + 4 N / D at stage 2. Stage 3: 3 N b besides its share.
    """
    stage, b, count = zero_stage(rank.config), rank.width, rank_parameters(rank)
    share, pipelined = FP32 * count / rank.data, rank.config.parallel.pipeline > 1
    if stage == 3:
        return share + 3 * count * b
    if b < FP32:
        return (10 if pipelined else 12) * count if stage == 1 else share + count * b
    if stage == 0 or pipelined:
        return 2 * FP32 * count
    return FP32 * count + share + (held_gradient_bytes(rank) if stage == 2 else 0.0)


def memory_estimate(rank: Rank) -> RankMemory:
    """Expected peak of one rank: the largest moment of a step.

    Without a pipeline: the loss, when all activations are there; the backward pass of each pass, when activations of
    later passes are gone and gradients of weights are there instead; the reduction. With one: the fullest moment of the
    schedule, or the reduction.
    """
    moments = [*running_moments(rank), (reduction_bytes(rank), 0.0, 0.0)]
    gradients, activations, other = max(moments, key=sum)
    return RankMemory(weight_bytes(rank), gradients, optimizer_bytes(rank), activations, other)


def running_moments(rank: Rank) -> list[tuple[float, float, float]]:
    """Gradients, activations and other memory at the moments of forward and backward passes that may need most.

    At ZeRO 3 forward passes gather the parameters, N b, and the backward pass lets them go as it proceeds.
    """
    sizes = [pass_bytes(rank, p) for p in passes(rank)]
    spaces = [workspace_bytes(rank, p) for p in passes(rank)]
    held, loss = held_gradient_bytes(rank), loss_bytes(rank)
    if rank.config.parallel.pipeline > 1:
        deferred = max(deferred_bytes(rank, p) for p in passes(rank))
        return [(held, most_in_flight(rank, sizes), deferred + max(*spaces, loss))]
    head = vocabulary_parameters(rank) * rank.width
    unfinished = held + unfinished_gradient_bytes(rank)
    moments = [(unfinished, sum(sizes[:end]), spaces[end - 1]) for end in range(1, len(sizes))]
    gathered = rank_parameters(rank) * rank.width if zero_stage(rank.config) == 3 else 0.0
    return [*moments, (held + head, sum(sizes), spaces[-1] + gathered), (held, sum(sizes), loss + gathered)]
