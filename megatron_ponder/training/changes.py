"""What a run does otherwise from here on than the checkpoint that it goes on from, in lines to be said."""

from pathlib import Path

from megatron_ponder.base.counts import counted
from megatron_ponder.base.errors import UserError
from megatron_ponder.checkpoint.manifest import Manifest
from megatron_ponder.config import Config
from megatron_ponder.config.batch_sizes import describe_batches
from megatron_ponder.config.sections import architecture_changes, turns_positions
from megatron_ponder.data.mixture import same_past
from megatron_ponder.model.modes import passes_of
from megatron_ponder.training.schedules import describe_learning_rate, learning_rate


def all_changes(folder: Path, manifest: Manifest, stored: Config, config: Config, data_fingerprint: str) -> list[str]:
    """Say all that is otherwise.

    Args:
        folder: of the checkpoint.
        manifest: of the checkpoint.
        stored: configuration of the checkpoint.
        config: to go on with.
        data_fingerprint: of the data that follow.

    Raises:
        UserError: as `schedule_changed`.
    """
    state = manifest.state
    lines = schedule_changed(folder, state.step, stored, config) + batches_changed(state.samples, stored, config)
    lines += positions_changed(stored, config)
    was, now = (each.data.sequence_length for each in (stored, config))
    if was != now:
        lines.append(f"data.sequence_length was {was} and is {now}")
    if manifest.data_fingerprint is not None and not same_past(
        manifest.data_fingerprint, data_fingerprint, state.samples
    ):
        lines.append(f"the data are not those that {folder} was trained on; their sample {state.samples:,} comes next")
    return lines


def schedule_changed(folder: Path, step: int, stored: Config, config: Config) -> list[str]:
    """Say that learning rates go on by another schedule than that of the checkpoint.

    Args:
        folder: of the checkpoint.
        step: optimiser steps that it has done.
        stored: configuration of the checkpoint.
        config: to go on with.

    Returns:
        A line for the schedule and one for the router's factor on it, or none where they are the same.

    Raises:
        UserError: a decay is to have begun that the checkpoint knows nothing of.
    """
    steps = config.training.steps
    before, after = (stored.training.steps, stored.optimizer), (steps, config.optimizer)
    was, now = (describe_learning_rate(step, *each) for each in (before, after))
    factors = [each.optimizer.router_learning_rate_factor for each in (stored, config)]
    lines = []
    if was != now and step > 0:
        begin = steps - (config.optimizer.decay_steps or 0)
        if begin < step and learning_rate(step - 1, *before) != learning_rate(step - 1, *after):
            raise UserError(
                f"the decay of optimizer.schedule wsd would begin at step {begin}, but {folder} has done "
                f"{counted(step, 'step')} by another ({was}); set optimizer.decay_steps to at most {steps - step}, "
                f"or training.steps to at least {step + config.optimizer.decay_steps}"
            )
        lines.append(f"the schedule of the learning rate was {was}; from step {step:,} on it is {now}")
    if factors[0] != factors[1] and passes_of(config.ponder).routed:
        lines.append(f"the factor on the router's learning rate was {factors[0]:.12g}, and is {factors[1]:.12g}")
    return lines


def batches_changed(samples: int, stored: Config, config: Config) -> list[str]:
    """Say that steps are of other global batches than they were to be.

    Args:
        samples: that the checkpoint has consumed.
        stored: its configuration.
        config: to go on with.

    Returns:
        One line, or none where they are the same.
    """
    was, now = (describe_batches(each.training, samples) for each in (stored, config))
    return [] if was == now else [f"the global batch was {was}; from sample {samples:,} on it is {now}"]


def positions_changed(stored: Config, config: Config) -> list[str]:
    """Say that positions are rotated otherwise than in a checkpoint.

    Args:
        stored: configuration of the checkpoint.
        config: to go on with.

    Returns:
        One line, or none where they are not.
    """
    changes = architecture_changes(config, stored).items()
    told = ", ".join(f"{key} was {was} and is {now}" for key, (was, now) in changes if turns_positions(key))
    return [told] if told else []
