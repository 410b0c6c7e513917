"""What steps cost, which changes when latent steps begin, and how many are left at what the last one cost."""

from functools import cache

from megatron_ponder.config import Config
from megatron_ponder.config.batch_sizes import samples_of
from megatron_ponder.estimates.flops import (
    FORWARD_AND_BACKWARD,
    head_flops,
    own_pairs,
    training_flops,
    training_work,
    work_of_passes,
)
from megatron_ponder.estimates.rank import plan_of, runs_once
from megatron_ponder.model.modes import passes_of
from megatron_ponder.model.tally import Tally
from megatron_ponder.training.schedules import StepPlan


class StepCosts:
    """Model FLOPs of the steps of a run, over all ranks."""

    def __init__(self, config: Config) -> None:
        """Count.

        Args:
            config: resolved, with a vocabulary size.
        """
        training = config.ponder_training
        self._config, self._steps = config, config.training.steps
        self._begin = training.latent_start if passes_of(config.ponder).steps else 0
        drawn, plain = training.refinement_draws, training_flops(config, 0, latents=False)
        self._ratio = sum(training_flops(config, r) for r in drawn) / len(drawn) / plain
        self._planned = cache(self._whole)

    def flops(self, plan: StepPlan, tally: Tally) -> float:
        """Model FLOPs of a step.

        Args:
            plan: of the step.
            tally: of the whole global batch, which knows what of the plan was run.
        """
        (matrices, attention, head), (slots, pairs) = self._planned(plan.refinements, plan.rule.latents)
        full = self._config.training.global_batch_size * self._config.data.sequence_length
        return (
            matrices * (tally.slot_work / slots) + attention * (tally.pair_work / pairs) + head * (tally.tokens / full)
        )

    def left(self, step: int, samples: int, batch: int) -> float:
        """How many steps at the cost of the last one the rest of the run is worth.

        Args:
            step: optimiser steps done.
            samples: consumed by them.
            batch: global batch of the last one.
        """
        training, plain = self._config.training, max(0, min(self._begin, self._steps) - step)
        before = samples_of(training, plain, samples)
        rest = samples_of(training, self._steps - step - plain, samples + before)
        return (before + rest * (self._ratio if step <= self._begin else 1.0)) / batch

    def change(self, step: int) -> str | None:
        """What is to be said of the cost of the step after `step` of them, where it is not that of the one before."""
        if step != self._begin or step == 0:
            return None
        return f"latent steps begin: from here a step takes {self._ratio:.1f} times as many operations"

    def _whole(self, refinements: int, latents: bool) -> tuple[tuple[float, float, float], tuple[float, float]]:
        """FLOPs of a step that runs every slot of its plan, and its `slot_work` and `pair_work`."""
        config, tokens = self._config, self._config.data.sequence_length
        batch = config.training.global_batch_size
        matrices, attention = training_work(config, refinements, latents)
        slots = [tokens * slots for slots in plan_of(config, refinements, latents)]
        times = work_of_passes(len(slots), config.ponder_training.gradient_passes)
        work = sum(n * count for n, count in zip(times, slots, strict=True))
        once = latents and runs_once(config)
        seen = [
            own_pairs(count, tokens, index) if once else count * (count + 1) / 2 for index, count in enumerate(slots)
        ]
        pairs = sum(n * count for n, count in zip(times, seen, strict=True))
        flops = (batch * matrices, batch * attention, batch * FORWARD_AND_BACKWARD * head_flops(config))
        return flops, (batch * work, batch * pairs)
