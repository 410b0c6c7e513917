"""What a run, or a phase of one, is given, in a module that imports nothing slow."""

from typing import NamedTuple

from megatron_ponder.config.command_options import Number
from megatron_ponder.config.declarations import Range

# Of a command line.
TOKENS = Number("tokens", float, Range(1, 10**18))


class Budget(NamedTuple):
    """What a run is given, or a phase of one.

    Attributes:
        tokens: to train on.
        mean_steps: mean K̂ once training prunes; None for what `estimates/phases.py` assumes.
        first_step: optimiser steps of the run before it.
        samples: consumed by them.
    """

    tokens: float
    mean_steps: float | None = None
    first_step: int = 0
    samples: int = 0
