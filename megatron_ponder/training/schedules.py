"""Schedules: pure functions of the configuration and the step, so that a resume needs no state."""

import hashlib
import math
from collections.abc import Callable
from typing import NamedTuple

from megatron_ponder.config import Config, OptimizerConfig, PonderTrainingConfig
from megatron_ponder.config.run import DecayShape
from megatron_ponder.model.router import Rule


class StepPlan(NamedTuple):
    """The settings of one optimiser step, fixed before it begins.

    Attributes:
        learning_rate: of every parameter.
        refinements: R.
        rule: how the passes apply the routing.
        penalty_weight: λ.
    """

    learning_rate: float
    refinements: int
    rule: Rule
    penalty_weight: float


def plan_step(step: int, config: Config, penalty_weight: float) -> StepPlan:
    """The plan of an optimiser step, the same on every rank.

    Args:
        step: optimiser steps done before this one.
        config: resolved.
        penalty_weight: λ, which is steered.
    """
    rate = learning_rate(step, config.training.steps, config.optimizer)
    r = refinements(step, config.training.seed, config.ponder_training)
    return StepPlan(rate, r, training_rule(step, config), penalty_weight)


def learning_rate(step: int, total_steps: int, config: OptimizerConfig) -> float:
    """Linear warm-up, then the configured schedule; the lowest rate is reached when all steps are done.

    Args:
        step: optimiser steps done before this one.
        total_steps: length of the schedule.
    """
    warmup, peak, lowest = config.warmup(total_steps), config.learning_rate, config.lowest_share
    if step < warmup:
        return peak * (step + 1) / warmup
    if config.schedule == "constant":
        return peak
    if config.schedule == "inverse_sqrt":
        return peak * max(lowest, math.sqrt(warmup / step))
    begin = total_steps - config.decay_steps if config.schedule == "wsd" else warmup
    progress = min(1.0, max(0, step - begin) / max(1, total_steps - begin))
    return peak * (lowest + (1 - lowest) * _SHAPES[decay_shape(config)](progress))


def decay_shape(config: OptimizerConfig) -> DecayShape:
    """How a schedule that ends with the run falls."""
    return (config.decay_shape or "linear") if config.schedule == "wsd" else config.schedule


# What is left of the way from the peak to the lowest rate, by the share of the decay that is done.
_SHAPES: dict[DecayShape, Callable[[float], float]] = {
    "linear": lambda progress: 1 - progress,
    "1-sqrt": lambda progress: 1 - math.sqrt(progress),
    "cosine": lambda progress: 0.5 * (1 + math.cos(math.pi * progress)),
}


def describe_learning_rate(step: int, total_steps: int, config: OptimizerConfig) -> str:
    """The schedule in words that leave out nothing on which its rates depend, from a step on.

    Args:
        step: optimiser steps done before.
        total_steps: length of the schedule.
    """
    kind, warmup = config.schedule, config.warmup(total_steps)
    peak, lowest = f"{config.learning_rate:.12g}", f"{config.learning_rate * config.lowest_share:.12g}"
    over = step >= warmup and (kind in ("wsd", "constant") or not warmup)
    rises = "" if over else f" after {warmup:,} steps of warm-up"
    if kind == "constant" or config.decay_steps == 0:
        return f"constant at {peak}{rises}"
    if kind == "inverse_sqrt":
        return f"inverse_sqrt from {peak}{rises}, at least {lowest}"
    if kind == "wsd":
        begin = total_steps - config.decay_steps
        return f"wsd at {peak}{rises}, {decay_shape(config)} from step {begin:,} to {lowest} at step {total_steps:,}"
    return f"{kind} from {peak}{rises} to {lowest} at step {total_steps:,}"


def refinements(step: int, seed: int, config: PonderTrainingConfig) -> int:
    """R of this optimiser step: drawn as configured, the same on every rank and after a resume."""
    choices = config.refinement_draws
    digest = hashlib.sha256(f"refinements/{seed}/{step}".encode()).digest()
    return choices[int.from_bytes(digest[:8], "little") % len(choices)]


def training_rule(step: int, config: Config) -> Rule:
    """The rule by which the passes of this optimiser step apply the routing.

    Before `latent_start` no token takes a latent step, before `router_start` every token takes all of them, as in
    `fixed` mode; from `prune_start` on steps beyond K̂ are not there, as at inference; before it the mask is soft.
    """
    training, threshold = config.ponder_training, config.inference.threshold
    if step < training.latent_start:
        return Rule("none", threshold)
    if step < training.router_start:
        begun = step - training.latent_start + 1
        return Rule("all", threshold, share=min(1.0, begun / (training.latent_warmup + 1)))
    prunes = training.prune_start is not None and step >= training.prune_start
    return Rule("hard" if prunes else "soft", threshold)
