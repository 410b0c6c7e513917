"""Schedules: pure functions of the configuration and the step, so that a resume needs no state."""

import hashlib
import math
from typing import NamedTuple

from megatron_ponder.config import Config, OptimizerConfig, PonderTrainingConfig
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
    """Linear warm-up, then a cosine down to the configured share of the peak.

    Args:
        step: optimiser steps done before this one.
        total_steps: length of the schedule.
    """
    warmup = round(config.warmup_fraction * total_steps)
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, total_steps - warmup))
    lowest = config.min_learning_rate_fraction
    return config.learning_rate * (lowest + (1 - lowest) * 0.5 * (1 + math.cos(math.pi * progress)))


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
