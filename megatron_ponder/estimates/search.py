"""Layouts that a cluster's memory allows, and how they compare."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import get_args

from megatron_ponder.base.errors import UserError
from megatron_ponder.base.launch import Launch
from megatron_ponder.cluster.hardware import Hardware
from megatron_ponder.config import Config, check_layout, data_parallel_size, resolve, validate
from megatron_ponder.config.deepspeed import zero_stage
from megatron_ponder.config.layout import divides, ranks_of_sample
from megatron_ponder.config.run import RecomputeKind
from megatron_ponder.estimates.memory import RankMemory, memory_estimate
from megatron_ponder.estimates.rank import Rank, places
from megatron_ponder.estimates.step_time import StepTime, step_time

# What a layout is made of: section and key, in the order in which they are shown.
KEYS = (
    ("parallel", "tensor"),
    ("parallel", "context"),
    ("parallel", "pipeline"),
    ("parallel", "sequence_parallel"),
    ("parallel", "zero_stage"),
    ("training", "recompute"),
    ("training", "micro_batch_size"),
)


@dataclass(frozen=True)
class Plan:
    """One layout on a cluster.

    Attributes:
        config: with this layout.
        data: data-parallel ranks.
        memory: of the pipeline rank that needs most.
        time: of a step.
    """

    config: Config
    data: int
    memory: RankMemory
    time: StepTime


def check_ranks(config: Config, cluster: Hardware) -> int:
    """Data-parallel ranks of a layout on a cluster.

    Raises:
        UserError: if they do not divide, naming the nearest layout or batch that does.
    """
    check_layout(config, Launch(world_size=cluster.ranks, local_size=min(cluster.gpus_per_node, cluster.ranks)))
    return data_parallel_size(config, cluster.ranks)


def fullest_memory(config: Config, data: int, cluster: Hardware) -> RankMemory:
    """Memory of the pipeline rank that needs most."""
    every = (memory_estimate(Rank(config, data, place, cluster.device)) for place in places(config))
    return max(every, key=lambda memory: memory.total)


def plan_of(config: Config, cluster: Hardware) -> Plan:
    """A configuration as it is.

    Raises:
        UserError: as `check_ranks`.
    """
    data = check_ranks(config, cluster)
    return Plan(config, data, fullest_memory(config, data, cluster), step_time(config, data, cluster))


def fitting(config: Config, cluster: Hardware) -> list[Plan]:
    """Every layout of this model and batch that fits, fastest first.

    Varied are `KEYS`, context ranks only where fewer of them do not fit; with another number of pipeline ranks, blocks
    are divided evenly. The global batch stays. Times within about 1 % of each other are taken to be the same, and then
    fewer context ranks, a lower ZeRO stage and less memory come first.
    """
    plans, roomy = [], set()
    for candidate in _candidates(config, cluster):
        same = _without_context(candidate)
        if candidate.parallel.context not in (1, config.parallel.context) and same in roomy:
            continue  # more data ranks in their place are faster
        try:
            data = check_ranks(validate(resolve(candidate)), cluster)
        except UserError:
            continue
        memory = fullest_memory(candidate, data, cluster)
        if memory.total <= cluster.usable_memory:
            plans.append(Plan(candidate, data, memory, step_time(candidate, data, cluster)))
            roomy |= {same} if candidate.training.micro_batch_size == 1 else set()
    return sorted(plans, key=_rank)


def _without_context(config: Config) -> tuple:
    """A layout but for its context ranks, of which a search tries the fewest first, and its micro-batches."""
    own = config.parallel
    return own.tensor, own.pipeline, own.sequence_parallel, own.zero_stage, config.training.recompute


def _rank(plan: Plan) -> tuple:
    parallel = plan.config.parallel
    return round(math.log(plan.time.total), 2), parallel.context, parallel.zero_stage, plan.memory.total


def nearest(config: Config, plans: list[Plan]) -> Plan | None:
    """The layout with the fewest changes of those that fit; of several the fastest. None if none fits."""
    return min(plans, key=lambda plan: (len(changes(config, plan.config)), plan.time.total), default=None)


def changes(config: Config, other: Config) -> dict[str, object]:
    """What has to be set to go from one layout to another, by dotted key."""
    changed = {}
    for section, key in KEYS:
        before, after = (getattr(getattr(of, section), key) for of in (config, other))
        if before != after:
            changed[f"{section}.{key}"] = after
    if other.parallel.pipeline_layers != config.parallel.pipeline_layers:
        changed["parallel.pipeline_layers"] = None
    if other.parallel.pipeline_schedule != config.parallel.pipeline_schedule:
        changed["parallel.pipeline_schedule"] = other.parallel.pipeline_schedule
    return changed


def flags(changed: dict[str, object]) -> str:
    """Changes as they are written on a command line."""
    words = {None: "null", True: "true", False: "false"}
    shown = {key: words[value] if value is None or isinstance(value, bool) else value for key, value in changed.items()}
    return " ".join(f"--{key} {value}" for key, value in shown.items())


def _candidates(config: Config, cluster: Hardware) -> Iterator[Config]:
    """Layouts whose sizes divide; whether the rest of the configuration allows them is for its checks to say."""
    training, own = config.training, config.parallel
    lowest = zero_stage(replace(config, parallel=replace(own, zero_stage=0)))
    for tensor, context, pipeline in _copies(config, cluster):
        same = pipeline == own.pipeline
        grid = replace(
            own,
            tensor=tensor,
            context=context,
            pipeline=pipeline,
            pipeline_layers=own.pipeline_layers if same else None,
            pipeline_schedule=own.pipeline_schedule if same else "1f1b",
        )
        micro_batches = _powers(training.global_batch_size * ranks_of_sample(grid) // cluster.ranks)
        if context not in (1, own.context):  # data ranks divide larger ones, and exchange nothing around attention
            micro_batches = [1]
        sequence_parallel, stages = (False, True)[:tensor], range(lowest, 4 if pipeline == 1 else 2)
        for size, split, stage, recompute in product(micro_batches, sequence_parallel, stages, get_args(RecomputeKind)):
            passes = None if recompute == "none" else training.recompute_passes
            yield replace(
                config,
                parallel=replace(grid, sequence_parallel=split, zero_stage=stage),
                training=replace(training, micro_batch_size=size, recompute=recompute, recompute_passes=passes),
            )


def _copies(config: Config, cluster: Hardware) -> Iterator[tuple[int, int, int]]:
    """Numbers of tensor, context and pipeline ranks that leave data-parallel ranks whole, and each whole sequences."""
    batch, most = config.training.global_batch_size, config.model.num_layers
    for tensor, context in product(_divisors(cluster.gpus_per_node), _divisors(cluster.ranks)):
        sizes = {"tensor": tensor, "context": context}
        if cluster.ranks % (tensor * context) or not divides(config, sizes):
            continue
        for pipeline in _divisors(cluster.ranks // (tensor * context)):
            if pipeline <= most and batch % (cluster.ranks // (tensor * context * pipeline)) == 0:
                yield tensor, context, pipeline


def _divisors(number: int) -> list[int]:
    small = [divisor for divisor in range(1, math.isqrt(number) + 1) if number % divisor == 0]
    return sorted({*small, *(number // divisor for divisor in small)})


def _powers(number: int) -> list[int]:
    """Powers of two that divide it, and it itself if it is small."""
    powers = [1 << exponent for exponent in range(8) if number % (1 << exponent) == 0]
    return sorted({*powers, number}) if number <= 16 else powers
