"""The global batch of every optimiser step: one size, or those of a ramp, a pure function of the samples before."""

import math
from collections.abc import Iterator

from megatron_ponder.base.counts import counted
from megatron_ponder.config.run import TrainingConfig


def batch_sizes(training: TrainingConfig) -> range:
    """Every global batch that a run may have, the smallest first."""
    full, ramp = training.global_batch_size, training.batch_size_ramp
    return range(full, full + 1) if ramp is None else range(ramp.start, full + 1, ramp.increment)


def batch_size(training: TrainingConfig, samples: int) -> int:
    """The global batch of the optimiser step before which a run has consumed so many samples."""
    sizes, ramp = batch_sizes(training), training.batch_size_ramp
    if ramp is None or samples >= ramp.samples:
        return sizes[-1]
    return sizes[samples * (len(sizes) - 1) // ramp.samples]


def describe_batches(training: TrainingConfig, samples: int) -> str:
    """The global batches in words that leave out nothing on which they depend, after so many samples."""
    sizes, ramp = batch_sizes(training), training.batch_size_ramp
    if ramp is None or samples >= ramp.samples:
        return counted(sizes[-1], "sequence")
    first = counted(sizes[0], "sequence")
    return f"{first} and {sizes.step:,} more at a time up to {sizes[-1]:,} at sample {ramp.samples:,}"


def samples_of(training: TrainingConfig, steps: float, samples: int = 0) -> float:
    """How many samples optimiser steps consume, whole if they are.

    Args:
        steps: how many of them.
        samples: consumed before them.
    """
    taken = 0
    for size, count in _spans(training, samples):
        here = min(steps, count)
        taken, steps = taken + here * size, steps - here
        if steps <= 0:
            return taken


def steps_of(training: TrainingConfig, samples: float, before: int = 0) -> float:
    """How many optimiser steps samples of a run are for.

    Args:
        samples: how many of them.
        before: consumed before them.
    """
    steps = 0
    for size, count in _spans(training, before):
        here = min(samples / size, count)
        steps, samples = steps + here, samples - here * size
        if samples <= 0:
            return steps


def _spans(training: TrainingConfig, samples: int) -> Iterator[tuple[int, float]]:
    """Global batches in their order, from the step before which so many samples are consumed, each with its steps."""
    sizes, ramp = batch_sizes(training), training.batch_size_ramp
    while (size := batch_size(training, samples)) < sizes[-1]:
        following = -(-ramp.samples * (sizes.index(size) + 1) // (len(sizes) - 1))  # the first sample of a larger one
        steps = -(-(following - samples) // size)
        yield size, steps
        samples += steps * size
    yield sizes[-1], math.inf
