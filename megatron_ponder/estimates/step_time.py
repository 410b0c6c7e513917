"""How long an optimiser step takes on a cluster, part by part, from the configuration alone.

Nothing is measured. Symbols: P pipeline ranks, D data-parallel ranks, M micro-batches.
"""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from megatron_ponder.cluster.hardware import Hardware
from megatron_ponder.config import Config
from megatron_ponder.config.deepspeed import overlaps_reduction, zero_stage
from megatron_ponder.estimates.communication import Formula
from megatron_ponder.estimates.computation import Computation, Work
from megatron_ponder.estimates.flops import FORWARD_AND_BACKWARD, training_flops
from megatron_ponder.estimates.links import Links, collective_seconds
from megatron_ponder.estimates.rank import Rank, places
from megatron_ponder.estimates.schedule_walk import idle_share
from megatron_ponder.model.stages import PassShapes

# Of a forward pass; what is shorter costs less than what else is left out.
MESSAGE_THAT_COUNTS = 1e-3


@dataclass(frozen=True)
class StepTime:
    """Seconds of an optimiser step, on the pipeline rank that needs most.

    Attributes:
        parts: by name.
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


def time_of_rank(rank: Rank, cluster: Hardware, refinements: int) -> StepTime:
    """The step of one place in the pipeline, if it waits for others in the bubble alone.

    Tensor and context ranks wait for every collective; what pipeline ranks send is under way while they compute.
    """
    config, count = rank.config, rank.micro_batches
    computation, links = Computation(rank, cluster, refinements), Links(rank, cluster)
    work, first_backward = computation.micro_batch()
    collectives: Counter[tuple[str, str]] = Counter()
    during: Counter[str | None] = Counter()
    for term in Formula(rank, refinements).terms():
        seconds = collective_seconds(term, *links.of(term.axis))
        collectives[term.axis, term.operation] += seconds
        if (term.axis, term.operation) != ("pipeline", "send"):  # a part of the bubble
            during["waited" if term.axis in ("tensor", "context", "pipeline") else term.during] += seconds
    hidden = _hidden(rank, during, work, first_backward)
    sums, waited = computation.gradient_sums(), during.pop("waited", 0.0)
    share = _bubble(rank, links, refinements, work.total + waited / count)
    parts = {
        "matrices": count * work.matrices,
        "attention": count * work.attention,
        "element-wise": count * work.elementwise,
        "gradient sums": sums,
        "collectives": waited,
        "bubble": (count * work.total + sums + waited) * share / (1 - share),
        "reduction": during.total() - hidden,
        "optimiser": computation.optimizer(),
    }
    tokens = config.training.global_batch_size * config.data.sequence_length
    flops = training_flops(config, refinements, mean_steps=rank.mean_steps)
    return StepTime(parts, dict(collectives), hidden, flops, tokens)


def _bubble(rank: Rank, links: Links, refinements: int, micro_batch: float) -> float:
    """The share of the step in which this rank waits for others of its pipeline.

    Args:
        rank: the place.
        links: of its messages.
        refinements: R.
        micro_batch: seconds of one, forward and backward.
    """
    if rank.axes["pipeline"] == 1:
        return 0.0
    ranks, bandwidth, latency = links.of("pipeline")
    plan, kind = rank.chain.plan(refinements), rank.config.parallel.pipeline_schedule
    slot = micro_batch / (FORWARD_AND_BACKWARD * sum(plan))  # seconds of a forward pass over one
    carried = PassShapes(rank.config.ponder, refinements, rank.sizes).carried(ranks, rank.dtype)
    seconds = len(carried) * latency + sum(carried) * rank.width / bandwidth
    message = seconds / slot / sum(plan[stage // ranks] for stage in range(len(carried)))
    # Of few values, four in each power of two, so that a search plays few schedules through.
    message = 2 ** (round(4 * math.log2(message)) / 4) if message > MESSAGE_THAT_COUNTS else 0.0
    return idle_share(kind, ranks, rank.micro_batches, plan, message)


def _hidden(rank: Rank, during: Mapping[str | None, float], work: Work, first_backward: float) -> float:
    """Seconds of reductions that hide behind computation.

    On GPUs without a pipeline DeepSpeed reduces gradients while the backward pass still runs, but those of shared
    weights are whole only in the backward pass of the first pass: so much can hide, once a step, at ZeRO 2 and 3 in
    every micro-batch. The weights of ZeRO 3 are fetched ahead, and hide behind the forward passes.
    """
    if not overlaps_reduction(rank.config, rank.device):
        return 0.0
    repeats = rank.micro_batches if zero_stage(rank.config) >= 2 else 1
    forward = rank.micro_batches * work.total / FORWARD_AND_BACKWARD
    return min(during["backward"], repeats * first_backward) + min(during["forward"], forward)


def step_time(config: Config, data: int, cluster: Hardware, mean_steps: float | None = None) -> StepTime:
    """A step of a run that has latent steps, mean over the values of R that training draws.

    Args:
        config: resolved, with a vocabulary size.
        data: D.
        cluster: that it runs on.
        mean_steps: latent steps of a token in the mean, where the slots of others are not run; None where all are.
    """
    ranks = [Rank(config, data, place, cluster.device, mean_steps) for place in places(config)]
    choices, drawn = config.ponder_training.refinement_choices, config.ponder_training.refinement_draws
    times = {r: max((time_of_rank(rank, cluster, r) for rank in ranks), key=lambda time: time.total) for r in choices}
    return _mean([times[r] for r in drawn])


def _mean(times: list[StepTime]) -> StepTime:
    count = len(times)
    keys = dict.fromkeys(key for time in times for key in time.collectives)
    return StepTime(
        {part: sum(time.parts[part] for time in times) / count for part in times[0].parts},
        {key: sum(time.collectives.get(key, 0.0) for time in times) / count for key in keys},
        sum(time.hidden for time in times) / count,
        sum(time.flops for time in times) / count,
        times[0].tokens,
    )
