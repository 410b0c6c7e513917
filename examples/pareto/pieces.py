"""Runs in pieces, for machines that are lent for minutes: how long each run takes by estimate, and what fits."""

import time
from collections.abc import Callable, Sequence

from runs import VOCABULARY, Run

from megatron_ponder.cluster.description import Cluster
from megatron_ponder.cluster.hardware import hardware_of
from megatron_ponder.config import read_config
from megatron_ponder.config.batch_sizes import samples_of
from megatron_ponder.estimates.budget import Budget
from megatron_ponder.estimates.phases import phase_costs

GPU = "H100-SXM"
START = 20.0  # seconds from a command to its first step, assumed


def estimated_seconds(runs: Sequence[Run], size: str) -> list[float]:
    """Seconds that each run takes on one H100, as `ponder estimate` has it, and its start; the same for every seed."""
    of_variant = {run.variant: run for run in runs}
    seconds = {variant: _estimated(run, size) for variant, run in of_variant.items()}
    return [seconds[run.variant] for run in runs]


def _estimated(run: Run, size: str) -> float:
    config = read_config([*run.arguments, "--model.vocab_size", str(VOCABULARY[size])])
    hardware = hardware_of(Cluster(nodes=1, gpus_per_node=1, gpu=GPU), config.training.precision)
    tokens = samples_of(config.training, config.training.steps) * config.data.sequence_length
    return START + sum(part.seconds for part in phase_costs(config, 1, hardware, Budget(tokens)))


def cut(runs: Sequence[Run], seconds: Sequence[float], limit: float) -> list[list[Run]]:
    """Runs in pieces of at most so many seconds, in their order; a longer run is a piece of its own."""
    pieces, left = [], 0.0
    for run, needed in zip(runs, seconds, strict=True):
        if needed > left:
            pieces.append([])
            left = limit
        pieces[-1].append(run)
        left -= needed
    return pieces


def train_for(
    runs: Sequence[Run], seconds: Sequence[float], limit: float, jobs: int, train: Callable[[Sequence[Run], int], None]
) -> int:
    """Train runs that are not finished, and begin none that would end after the limit; at least one is begun.

    Args:
        runs: in their order.
        seconds: that each takes by estimate.
        limit: seconds from now on.
        jobs: runs at a time.
        train: that trains so many of them at once.

    Returns:
        How many are left.
    """
    begun = time.monotonic()
    left = [(run, needed) for run, needed in zip(runs, seconds, strict=True) if not run.finished]
    while left:
        train([run for run, _ in left[:jobs]], jobs)
        left = left[jobs:]
        if left and time.monotonic() - begun + max(needed for _, needed in left[:jobs]) > limit:
            break
    return len(left)
