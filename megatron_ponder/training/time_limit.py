"""The time that a run has left."""

import os
import time
from collections.abc import Mapping

from megatron_ponder.base.durations import parse_duration
from megatron_ponder.base.environment import read_number
from megatron_ponder.base.signals import StopSignals
from megatron_ponder.config import Config


def seconds_left(config: Config, signals: StopSignals, environ: Mapping[str, str] = os.environ) -> float | None:
    """Seconds until `training.time_limit`, from the start of this process on, or the end of SLURM's job if sooner.

    Returns:
        None if neither is known.

    Raises:
        UserError: SLURM_JOB_END_TIME is no time.
    """
    known = []
    if config.training.time_limit is not None:
        known.append(parse_duration(config.training.time_limit) - (time.monotonic() - signals.created))
    end = read_number(environ, "SLURM_JOB_END_TIME", 1)
    if end is not None:
        known.append(end - time.time())
    return min(known, default=None)
