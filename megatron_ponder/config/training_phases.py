"""The phases of a run, each a configuration of its own: what `training.phases` says is otherwise, from some step on."""

from dataclasses import fields, replace
from itertools import pairwise
from typing import NamedTuple

from megatron_ponder.base.errors import UserError
from megatron_ponder.config.checks import validate
from megatron_ponder.config.model import ROPE_SCALINGS
from megatron_ponder.config.run import TrainingPhaseConfig
from megatron_ponder.config.sections import Config, resolve

_SECTIONS = ("data", "model", "training")
# Given together: what a phase leaves out of them has its usual value, and not that of the phase before.
_SCALING = frozenset({"rope_scaling"}.union(*ROPE_SCALINGS.values()))


class TrainingPhase(NamedTuple):
    """Optimiser steps that are configured alike.

    Attributes:
        first_step: optimiser steps of the run before it.
        last_step: those at its end.
        config: of these, without phases.
    """

    first_step: int
    last_step: int
    config: Config


def training_phases(config: Config) -> list[TrainingPhase]:
    """The phases of a run, the first from step 0 on, one alone where `training.phases` is empty.

    Args:
        config: resolved and validated.

    Raises:
        UserError: they are not in rising order, or one cannot work; says which.
    """
    training = config.training
    begins = [0, *(phase.first_step for phase in training.phases), training.steps]
    for before, begin in pairwise(begins):
        if begin <= before:
            raise UserError(
                f"training.phases: first_step {before} and then {begin}, of training.steps {training.steps}; give "
                "phases in rising order, each with a first_step below training.steps"
            )
    current = replace(config, training=replace(training, phases=[]))
    found = [TrainingPhase(0, begins[1], current)]
    for phase, (begin, end) in zip(training.phases, list(pairwise(begins))[1:], strict=True):
        try:
            current = validate(resolve(_changed(current, phase)))
        except UserError as error:
            raise UserError(f"in the phase of training.phases from step {begin} on: {error}") from error
        found.append(TrainingPhase(begin, end, current))
    return found


def check_phases(config: Config) -> Config:
    """Refuse phases that cannot work.

    Raises:
        UserError: as `training_phases`.
    """
    training_phases(config)
    return config


def _changed(config: Config, phase: TrainingPhaseConfig) -> Config:
    """The configuration before a phase with what the phase says, not resolved yet."""
    given = {item.name: getattr(phase, item.name) for item in fields(phase) if item.name != "first_step"}
    given = {name: value for name, value in given.items() if value is not None}
    if not given:
        raise UserError("nothing is otherwise; give what is, or leave the phase out")
    if _SCALING & given.keys():
        given = dict.fromkeys(_SCALING - {"rope_scaling"}) | given
    if "sequence_length" in given and "max_position_embeddings" not in given:
        given["max_position_embeddings"] = max(given["sequence_length"], config.model.max_position_embeddings)
    if "path" in given:
        given["phases"] = []  # of the data; they would take this path's place
    homes = {name: {item.name for item in fields(getattr(config, name))} for name in _SECTIONS}
    homes["training"] -= {"phases"}
    changed = {
        name: replace(getattr(config, name), **{key: given[key] for key in given.keys() & homes[name]})
        for name in _SECTIONS
    }
    return replace(config, **changed)
