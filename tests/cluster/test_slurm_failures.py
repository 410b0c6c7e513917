"""Ranks and nodes that fail: the job ends, within the minute that srun waits, and what was saved goes on."""

import os
import signal
import time

import pytest

from tests.cluster.runs import assert_same_run, long_arguments, starts, succeed, wait_for_steps
from tests.cluster.virtual_cluster import wait_for

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

# From the failure to the end of the job: `srun --wait` of the scripts, SLURM's own 5 s, and some for a busy machine.
SECONDS_TO_THE_END = 60 + 5 + 30


@pytest.mark.parametrize(("lose", "regain"), [("power_off", "power_on"), ("cut_off", "plug_in")])
def test_a_node_that_fails_sends_the_job_back(submit, cluster, corpus, uninterrupted, tmp_path, lose, regain):
    run = tmp_path / "run"
    number = submit("train", *long_arguments(corpus, run))
    wait_for_steps(cluster, number, run, 8)
    getattr(cluster, lose)(2)
    try:
        wait_for(lambda: cluster.job(number)["Restarts"] == "1", 90, lambda: str(cluster.job(number)))
    finally:
        getattr(cluster, regain)(2)
    succeed(cluster, number, timeout=240)
    assert starts(run)[-1]["step"] >= 5
    assert_same_run(run, uninterrupted)


def test_a_rank_that_is_killed_takes_the_job_down(submit, cluster, corpus, uninterrupted, tmp_path):
    run = tmp_path / "run"
    arguments = long_arguments(corpus, run)
    number = submit("train", *arguments)
    wait_for_steps(cluster, number, run, 8)
    rank = cluster.ranks(number)[3]
    assert cluster.node_of(rank) == 2
    os.kill(rank.pid, signal.SIGKILL)
    killed = time.monotonic()
    job = cluster.wait(number, timeout=SECONDS_TO_THE_END)
    print(f"the job has ended after {time.monotonic() - killed:.1f} s")
    assert job["JobState"] == "FAILED"
    assert job["Restarts"] == "0"  # a failure, which to start again could only repeat
    assert "Connection closed by peer" in cluster.output(job)  # the others say what they have seen
    succeed(cluster, submit("train", *arguments))
    assert starts(run)[-1]["step"] >= 5
    assert_same_run(run, uninterrupted)


def test_a_rank_that_stops_takes_the_job_down(submit, cluster, corpus, uninterrupted, tmp_path):
    run, limit = tmp_path / "run", 30
    arguments = long_arguments(corpus, run, training__step_timeout=limit)
    number = submit("train", *arguments)
    wait_for_steps(cluster, number, run, 8)
    os.kill(cluster.ranks(number)[3].pid, signal.SIGSTOP)
    job = cluster.wait(number, timeout=limit + SECONDS_TO_THE_END)
    assert job["JobState"] == "FAILED"
    assert "nothing has happened for" in cluster.output(job)  # with the stacks of those that waited
    succeed(cluster, submit("train", *arguments))
    assert starts(run)[-1]["step"] >= 5
    assert_same_run(run, uninterrupted)
