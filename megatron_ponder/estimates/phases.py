"""The phases of a run: tokens alone, with latent steps, pruned; what a step of each computes, and how long it takes."""

from dataclasses import dataclass, replace
from typing import NamedTuple

from megatron_ponder.cluster.hardware import Hardware
from megatron_ponder.config import Config
from megatron_ponder.config.batch_sizes import samples_of, steps_of
from megatron_ponder.estimates.budget import Budget
from megatron_ponder.estimates.flops import training_flops
from megatron_ponder.estimates.step_time import StepTime, step_time
from megatron_ponder.model.modes import passes_of


@dataclass(frozen=True)
class RunPhase:
    """Optimiser steps that are trained alike, up to the next phase or the end of the run.

    Attributes:
        name: what they run, in words.
        begin: optimiser steps before them.
        time: of one.
    """

    name: str
    begin: int
    time: StepTime


class PhaseCost(NamedTuple):
    """What a run spends in a phase.

    Attributes:
        phase: it.
        steps: of the optimiser.
        batches: full global batches that they consume, which are as many unless the batch grows.
    """

    phase: RunPhase
    steps: float
    batches: float

    @property
    def flops(self) -> float:
        """Model FLOPs of all its steps, over all ranks."""
        return self.batches * self.phase.time.flops

    @property
    def seconds(self) -> float:
        """All its steps."""
        return self.batches * self.phase.time.total


def phases_of(config: Config, data: int, cluster: Hardware, mean_steps: float | None = None) -> list[RunPhase]:
    """The phases that a configuration has, in their order.

    Args:
        config: resolved, with a vocabulary size.
        data: D.
        cluster: that it runs on.
        mean_steps: mean K̂ once training prunes; as `assumed_steps` unless given.
    """
    training, begin = config.ponder_training, 0
    found = []
    if passes_of(config.ponder).steps and training.latent_start:
        found.append(RunPhase("tokens alone", 0, _time_without_latents(config, data, cluster)))
        begin = training.latent_start
    name = "latent steps" if passes_of(config.ponder).steps else "tokens alone"
    found.append(RunPhase(name, begin, step_time(config, data, cluster)))
    if packs(config):
        mean = assumed_steps(config) if mean_steps is None else mean_steps
        begin = max(training.prune_start, training.router_decides)
        found.append(RunPhase(f"pruned to {mean:.2f}", begin, step_time(config, data, cluster, mean)))
    return found


def packs(config: Config) -> bool:
    """Whether a run comes to leave out slots."""
    prunes = passes_of(config.ponder).routed and config.ponder_training.prune_start is not None
    return prunes and config.ponder_training.packed


def assumed_steps(config: Config) -> float:
    """Mean K̂ that pruned training is taken to have: its budget, or half of the most."""
    target = config.ponder_training.target_latent_steps
    return config.ponder.steps / 2 if target is None else min(target, config.ponder.steps)


def phase_costs(config: Config, data: int, cluster: Hardware, budget: Budget) -> list[PhaseCost]:
    """What a run spends in every phase that it comes to; a smaller batch of a ramp takes a part of a full one's time.

    Args:
        config, data, cluster: as in `phases_of`.
        budget: of the run.
    """
    training, taken = config.training, budget.samples
    steps = budget.first_step + steps_of(training, budget.tokens / config.data.sequence_length, taken)
    phases, parts = phases_of(config, data, cluster, budget.mean_steps), []
    for phase, end in zip(phases, [*(phase.begin for phase in phases[1:]), steps], strict=True):
        begin, end = max(phase.begin, budget.first_step), min(end, steps)
        if end > begin:
            samples = samples_of(training, end - begin, taken)
            parts.append(PhaseCost(phase, end - begin, samples / training.global_batch_size))
            taken += samples
    return parts


def _time_without_latents(config: Config, data: int, cluster: Hardware) -> StepTime:
    """A step before `latent_start`: that of the mode without latent steps, and a router that is asked all the same."""
    vanilla = replace(config, ponder=replace(config.ponder, mode="vanilla"))
    return replace(step_time(vanilla, data, cluster), flops=training_flops(config, 0, latents=False))
