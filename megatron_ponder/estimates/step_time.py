"""How long an optimiser step takes on a cluster, part by part, from the configuration alone.

Nothing is measured: each function states its equation, so that a reader can check it against the code it describes.
Symbols: B sequences of a micro-batch, L tokens, T slots of a sequence in a pass, H hidden size, F feed-forward width, V
vocabulary, t tensor ranks, P pipeline ranks, D data-parallel ranks, M micro-batches, N parameters of a rank, b bytes of
an activation.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from megatron_ponder.checkpoint.optimizer_state import WEIGHT_BYTES, moment_bytes
from megatron_ponder.cluster.hardware import Cluster
from megatron_ponder.config import Config, stage_layers
from megatron_ponder.config.deepspeed import overlaps_reduction, zero_stage
from megatron_ponder.estimates.communication import FP32, Formula, Term, mesh_on_paper, parameter_sizes
from megatron_ponder.estimates.flops import FORWARD_AND_BACKWARD, slots_of_passes, training_flops
from megatron_ponder.estimates.rank import Rank, vocabulary_parameters
from megatron_ponder.kernels.attention import FOLDED_CHANNELS

PARTS = ("matrices", "attention", "element-wise", "gradient sums", "collectives", "bubble", "reduction", "optimiser")
# The kernels' backward pass computes probabilities anew and then four products, after two in the forward pass.
ATTENTION_BACKWARD = 2.5


@dataclass(frozen=True)
class StepTime:
    """Seconds of an optimiser step, on the pipeline rank that needs most.

    Attributes:
        parts: by name of `PARTS`.
        collectives: seconds of every axis and operation, before any of it is hidden behind computation.
        hidden: of these, what is.
        flops: model FLOPs of the step over all ranks.
        tokens: of the step.
    """

    parts: dict[str, float]
    collectives: dict[tuple[str, str], float]
    hidden: float
    flops: float
    tokens: int

    @property
    def total(self) -> float:
        """Seconds of the step."""
        return sum(self.parts.values())

    @property
    def tokens_per_second(self) -> float:
        """Over all ranks."""
        return self.tokens / self.total

    def utilisation(self, cluster: Cluster) -> float:
        """Model FLOP utilisation: of the peak of all GPUs."""
        return self.flops / self.total / (cluster.ranks * cluster.peak)


@dataclass
class Work:
    """Seconds of computation."""

    matrices: float = 0.0
    attention: float = 0.0
    elementwise: float = 0.0

    def add(self, other: "Work", times: float = 1.0) -> None:
        """Add some other work so many times."""
        self.matrices += times * other.matrices
        self.attention += times * other.attention
        self.elementwise += times * other.elementwise

    @property
    def total(self) -> float:
        """All of it."""
        return self.matrices + self.attention + self.elementwise


def bubble_share(pipeline: int, micro_batches: int, passes: int) -> float:
    """Share of a step in which a pipeline rank waits: (P − 1) / (passes · M + P − 1), if M ≥ P.

    The ring is filled and emptied once for all passes of all micro-batches; `benchmarks/pipeline_schedule.py` counts
    this from the schedules that run. With fewer micro-batches than ranks, a micro-batch comes round only after P
    stages, so that a step has passes · P + M − 1 of them in place of passes · M + P − 1.
    """
    stages = passes * max(micro_batches, pipeline) + min(micro_batches, pipeline) - 1
    return 1 - passes * micro_batches / stages


def collective_seconds(term: Term, ranks: int, bandwidth: float, latency: float) -> float:
    """A ring moves 2 (n − 1) / n of an all-reduce's message over each link, half as much for its two halves.

    As counted in NCCL's tests (doc/PERFORMANCE.md). Latency is that of a tree, ⌈log₂ n⌉ hops there, and for an
    all-reduce back.
    """
    if term.operation == "send":
        return term.calls * latency + term.bytes / bandwidth
    ways = 2 if term.operation == "all-reduce" else 1
    return (
        term.calls * ways * math.ceil(math.log2(ranks)) * latency + ways * (ranks - 1) / ranks * term.bytes / bandwidth
    )


@dataclass(frozen=True)
class Links:
    """What an axis of the mesh communicates over.

    Tensor ranks are neighbours, then data ranks, and pipeline ranks are farthest apart (`parallel/mesh.py`).
    """

    config: Config
    cluster: Cluster
    data: int

    def of(self, axis: str) -> tuple[int, float, float]:
        """Ranks, bandwidth and latency of an axis.

        A ring over nodes enters and leaves each of them once, through the network ports of as many GPUs as it has
        members there: its bandwidth is theirs together, and at most that inside a node.
        """
        parallel, cluster = self.config.parallel, self.cluster
        tensor, all_ranks = parallel.tensor, parallel.tensor * self.data * parallel.pipeline
        ranks, extent = {
            "tensor": (tensor, tensor),
            "data": (self.data, tensor * self.data),
            "pipeline": (parallel.pipeline, all_ranks),
            "model": (tensor * parallel.pipeline, all_ranks if parallel.pipeline > 1 else tensor),
        }[axis]
        if extent <= cluster.gpus_per_node:
            return ranks, cluster.intra_bandwidth * cluster.link_share, cluster.intra_latency
        ports = max(1, min(self.data, cluster.gpus_per_node // tensor)) if axis == "data" else 1
        bandwidth = min(cluster.intra_bandwidth, ports * cluster.inter_bandwidth)
        return ranks, bandwidth * cluster.link_share, cluster.inter_latency


@dataclass
class RankStep:
    """A step of the ranks of one place in the pipeline.

    Attributes:
        rank: the place.
        cluster: that it runs on.
        refinements: R of the step.
    """

    rank: Rank
    cluster: Cluster
    refinements: int

    @cached_property
    def _sharded(self) -> tuple[int, int, int]:
        """H, F and the width of keys, divided over the tensor ranks."""
        model, t = self.rank.config.model, self.rank.config.parallel.tensor
        return model.hidden_size // t, model.ffn_hidden_size // t, model.num_kv_heads * model.head_size // t

    def product(self, rows: float, inner: int, columns: float) -> float:
        """Seconds of (rows × inner) (inner × columns): its 2 · rows · inner · columns operations, or its memory."""
        cluster, b = self.cluster, self.rank.width
        operations = 2 * rows * inner * columns / (cluster.peak * cluster.matrix_share)
        return max(operations, self.moved(b * (rows * inner + inner * columns + rows * columns)))

    def moved(self, size: float) -> float:
        """Seconds in which so many bytes are read or written."""
        return size / (self.cluster.memory_bandwidth * self.cluster.memory_bandwidth_share)

    def attention(self, run: int, folded: bool) -> Work:
        """Everything of a block up to the output projection, forward.

        Products with 2 T (H² + 2 H kv)/t operations, attention with 4 H/t for each query and key that it may see (whole
        blocks of keys), the norm (T 2 H b), rotations of q and k (T 2 (H + kv)/t b).
        """
        model, rank, b = self.rank.config.model, self.rank, self.rank.width
        batch, hidden = rank.config.training.micro_batch_size, model.hidden_size
        own, _, kv = self._sharded
        rows = batch * run
        pairs = batch * rank.attention.pairs(run)
        channels = (model.head_size + FOLDED_CHANNELS) / model.head_size if folded else 1.0
        return Work(
            self.product(rows, hidden, own) + 2 * self.product(rows, hidden, kv),
            4 * own * pairs * channels / (self.cluster.peak * self.cluster.attention_share),
            self.moved(b * (2 * rank.residual(rows) * hidden + 2 * rows * (own + kv) * channels)),
        )

    def feed_forward(self, kept: int) -> Work:
        """The rest of a block, forward: 2 T' (H² + 3 H F)/t operations.

        Norm and two additions to the stream (T' 8 H b), the activation function (T' 3 F/t b, or 2 F/t without a gate).
        """
        model, b = self.rank.config.model, self.rank.width
        rows, hidden = self.rank.config.training.micro_batch_size * kept, model.hidden_size
        own, ffn, _ = self._sharded
        gated = model.family == "llama"
        products = self.product(rows, own, hidden) + (2 if gated else 1) * self.product(rows, hidden, ffn)
        products += self.product(rows, ffn, hidden)
        return Work(
            products,
            0.0,
            self.moved(b * (8 * self.rank.residual(rows) * hidden + (3 if gated else 2) * rows * ffn)),
        )

    def head(self) -> Work:
        """Head and loss, forward and backward: 6 B L H V/t operations, and 36 + 2 b bytes for each logit.

        Cross-entropy reads and writes its fp32 logits about nine times in all.
        """
        rank, model = self.rank, self.rank.config.model
        rows = rank.config.training.micro_batch_size * rank.config.data.sequence_length
        columns = vocabulary_parameters(rank) / model.hidden_size
        products = FORWARD_AND_BACKWARD * self.product(rows, model.hidden_size, columns)
        return Work(products, 0.0, self.moved(rows * columns * (36 + 2 * rank.width)))

    def micro_batch(self) -> tuple[Work, float]:
        """All passes of one micro-batch; and of these, the backward pass of the first pass that has one.

        A backward pass does twice the work of its forward pass, attention 2.5 times; what is recomputed comes on top.
        """
        config, work, first_backward = self.rank.config, Work(), None
        training = config.training
        slots = slots_of_passes(config, self.refinements)
        trained = config.ponder_training.gradient_passes or len(slots)
        for index, (run, kept) in enumerate(slots):
            kept = kept if self.rank.last else run
            front = self.attention(run, folded=self.rank.chain.routed and index > 0)
            inner, last = self.feed_forward(run), self.feed_forward(kept)
            forward, attended = Work(), Work()
            attended.add(front, len(self.rank.layers))
            forward.add(attended)
            forward.add(inner, len(self.rank.layers) - 1)
            forward.add(last)
            work.add(forward)
            if index < len(slots) - trained:
                continue
            backward = Work(2 * forward.matrices, ATTENTION_BACKWARD * forward.attention, 2 * forward.elementwise)
            if training.recompute_passes is None or index < training.recompute_passes:
                again = {"block": forward, "attention": attended}.get(training.recompute, Work())
                backward.add(again)
            work.add(backward)
            first_backward = backward.total if first_backward is None else first_backward
        if self.rank.last:
            work.add(self.head(), len(slots) if self.rank.chain.predicts else 1)
        return work, first_backward

    def gradient_sums(self) -> float:
        """Every pass adds its gradients of weights to those before, 3 N b; sums of micro-batches in fp32, N (b + 8)."""
        rank = self.rank
        count, passes = self.parameters, len(slots_of_passes(rank.config, self.refinements))
        again = rank.micro_batches > 1 or rank.width < FP32
        size = 3 * rank.width * count * (passes - 1) + (count * (rank.width + 2 * FP32) if again else 0)
        return rank.micro_batches * self.moved(size)

    @cached_property
    def parameters(self) -> int:
        """N."""
        return sum(count for _, count in parameter_sizes(self.rank))

    def optimizer(self) -> float:
        """Weight and moments are read and written, the gradient read thrice and, for clipping, written, all in fp32.

        Of AdamW 40 bytes for each of N / D parameters; N without ZeRO.
        """
        shared = zero_stage(self.rank.config) > 0
        size = 2 * (WEIGHT_BYTES + moment_bytes(self.rank.config.optimizer)) + 4 * FP32
        return self.moved(size * self.parameters / (self.rank.data if shared else 1))

    def terms(self) -> Iterator[tuple[Term, float]]:
        """Everything that is communicated, with its seconds."""
        config, data = self.rank.config, self.rank.data
        mesh = mesh_on_paper(config, data, self.rank.pipeline_rank, self.rank.device)
        links = Links(config, self.cluster, data)
        for term in Formula(config, mesh, parameter_sizes(self.rank), self.refinements).terms():
            yield term, collective_seconds(term, *links.of(term.axis))

    def time(self) -> StepTime:
        """The step of this place in the pipeline, if it waits for others in the bubble alone.

        Tensor ranks wait for every collective, and pipeline ranks for what they receive. On GPUs without a pipeline
        DeepSpeed reduces gradients while the backward pass still runs, but those of shared weights are whole only in
        the backward pass of the first pass: so much can hide, once a step, at ZeRO 2 and 3 in every micro-batch. The
        weights of ZeRO 3 are fetched ahead, and hide behind the forward passes.
        """
        config, count = self.rank.config, self.rank.micro_batches
        work, first_backward = self.micro_batch()
        kinds: dict[tuple[str, str], float] = {}
        waited, gradients, weights, exposed = 0.0, 0.0, 0.0, 0.0
        for term, seconds in self.terms():
            kinds[term.axis, term.operation] = kinds.get((term.axis, term.operation), 0.0) + seconds
            if term.axis in ("tensor", "pipeline"):
                waited += seconds
            elif term.reason == "gradients":
                gradients += seconds
            elif term.reason == "weights, for all passes":
                weights += seconds
            else:
                exposed += seconds
        hidden, stage = 0.0, zero_stage(config)
        if overlaps_reduction(config, self.rank.device) and stage > 0:
            hidden = min(gradients, (count if stage >= 2 else 1) * first_backward)
            hidden += min(weights, count * work.total / FORWARD_AND_BACKWARD)
        sums = self.gradient_sums()
        busy = count * work.total + sums + waited
        share = bubble_share(config.parallel.pipeline, count, len(slots_of_passes(config, self.refinements)))
        values = (
            count * work.matrices,
            count * work.attention,
            count * work.elementwise,
            sums,
            waited,
            busy * share / (1 - share),
            gradients + weights + exposed - hidden,
            self.optimizer(),
        )
        tokens = config.training.global_batch_size * config.data.sequence_length
        return StepTime(
            dict(zip(PARTS, values, strict=True)), kinds, hidden, training_flops(config, self.refinements), tokens
        )


def places(config: Config) -> list[int]:
    """Places in the pipeline of which one needs most: the ends, and the first of every number of blocks."""
    counts = [len(layers) for layers in stage_layers(config)]
    between = {counts[place]: place for place in reversed(range(len(counts)))}
    return sorted({0, len(counts) - 1, *between.values()})


def step_time(config: Config, data: int, cluster: Cluster) -> StepTime:
    """A step of a run, mean over the values of R that training draws.

    Args:
        config: resolved, with a vocabulary size.
        data: D.
        cluster: that it runs on.
    """
    drawn = config.ponder_training.refinement_choices
    slowest = []
    for refinements in drawn:
        every = [RankStep(Rank(config, data, place, cluster.device), cluster, refinements) for place in places(config)]
        slowest.append(max((step.time() for step in every), key=lambda time: time.total))
    return _mean(slowest)


def _mean(times: list[StepTime]) -> StepTime:
    count = len(times)
    keys = dict.fromkeys(key for time in times for key in time.collectives)
    return StepTime(
        {part: sum(time.parts[part] for time in times) / count for part in PARTS},
        {key: sum(time.collectives.get(key, 0.0) for time in times) / count for key in keys},
        sum(time.hidden for time in times) / count,
        sum(time.flops for time in times) / count,
        times[0].tokens,
    )
