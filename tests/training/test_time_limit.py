"""How much time a run has."""

import time

import pytest

from megatron_ponder.base.errors import UserError
from megatron_ponder.base.signals import StopSignals
from megatron_ponder.training.time_limit import seconds_left
from tests.models import small_config


def test_the_sooner_of_two_ends_counts():
    signals = StopSignals()
    assert seconds_left(small_config(), signals, {}) is None
    slurm = {"SLURM_JOB_END_TIME": str(int(time.time()) + 100)}
    assert 90 < seconds_left(small_config(), signals, slurm) <= 101
    assert 90 < seconds_left(small_config(training__time_limit="3"), signals, slurm) <= 101
    assert 50 < seconds_left(small_config(training__time_limit="1"), signals, slurm) <= 60
    assert seconds_left(small_config(), signals, {"SLURM_JOB_END_TIME": " "}) is None
    with pytest.raises(UserError, match='SLURM_JOB_END_TIME is "tomorrow", not a number from 1'):
        seconds_left(small_config(), signals, {"SLURM_JOB_END_TIME": "tomorrow"})
