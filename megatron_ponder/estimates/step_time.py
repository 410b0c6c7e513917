"""How long an optimiser step takes on a cluster, part by part, from the configuration alone.

Nothing is measured: each function states its equation, so that a reader can check it against the code it describes.
Symbols: B sequences of a micro-batch, L tokens, T slots of a sequence in a pass, H hidden size, F feed-forward width, V
vocabulary, t tensor ranks, P pipeline ranks, D data-parallel ranks, M micro-batches, N parameters of a rank, b bytes of
an activation.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from megatron_ponder.cluster.hardware import Hardware
from megatron_ponder.config import Config
from megatron_ponder.config.deepspeed import overlaps_reduction, zero_stage
from megatron_ponder.estimates.communication import Formula, Term
from megatron_ponder.estimates.computation import Computation
from megatron_ponder.estimates.flops import FORWARD_AND_BACKWARD, training_flops
from megatron_ponder.estimates.links import Links, collective_seconds
from megatron_ponder.estimates.rank import Rank, places, slots_of_passes

PARTS = ("matrices", "attention", "element-wise", "gradient sums", "collectives", "bubble", "reduction", "optimiser")


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

    def utilisation(self, cluster: Hardware) -> float:
        """Model FLOP utilisation: of the peak of all GPUs."""
        return self.flops / self.total / (cluster.ranks * cluster.peak)


def bubble_share(pipeline: int, micro_batches: int, passes: int) -> float:
    """Share of a step in which a pipeline rank waits: (P − 1) / (passes · M + P − 1), if M ≥ P.

    The ring is filled and emptied once for all passes of all micro-batches; `benchmarks/pipeline_schedule.py` counts
    this from the schedules that run. With fewer micro-batches than ranks, a micro-batch comes round only after P
    stages, so that a step has passes · P + M − 1 of them in place of passes · M + P − 1.
    """
    stages = passes * max(micro_batches, pipeline) + min(micro_batches, pipeline) - 1
    return 1 - passes * micro_batches / stages


@dataclass(frozen=True)
class RankStep(Computation):
    """A step of the ranks of one place in the pipeline."""

    def terms(self) -> Iterator[tuple[Term, float]]:
        """Everything that is communicated, with its seconds."""
        links = Links(self.rank, self.cluster)
        for term in Formula(self.rank, self.refinements).terms():
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


def step_time(config: Config, data: int, cluster: Hardware) -> StepTime:
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
