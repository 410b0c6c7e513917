"""The loop of step.sh in SLURM's hands, with ranks that do nothing: what it costs to lose one."""

import os
import signal
import sys
import time

import pytest

from tests import REPOSITORY
from tests.cluster.virtual_cluster import wait_for

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

# Ends as the others of a lost rank do, when it is told by a file.
RANK = """
import os, sys, time
print("up", os.environ["SLURM_RESTART_COUNT"] if "SLURM_RESTART_COUNT" in os.environ else 0, flush=True)
while not os.path.exists(sys.argv[1]):
    time.sleep(0.1)
sys.exit(int(open(sys.argv[1]).read()))
"""


@pytest.fixture
def job(cluster, tmp_path):
    """A job of two ranks on each node, which end with what is written into `tmp_path/code`."""
    (tmp_path / "rank.py").write_text(RANK)
    step = f"run_and_requeue srun --wait=60 --label {sys.executable} {tmp_path}/rank.py {tmp_path}/code"
    script = f"#!/bin/bash\ncd {REPOSITORY}\nsource megatron_ponder/cluster/scripts/step.sh\n{step}\n"
    (tmp_path / "job.sh").write_text(script)
    options = ["--nodes=2", "--ntasks-per-node=2", "--requeue", "--open-mode=append", f"--output={tmp_path}/log"]
    number = cluster.submit(*options, tmp_path / "job.sh")
    wait_for(
        lambda: (tmp_path / "log").exists() and (tmp_path / "log").read_text().count("up 0") == 4, 30, lambda: "up"
    )
    return number


@pytest.fixture
def patient(running_cluster):
    """SLURM as patient with a node that is silent as it is on most clusters."""
    configuration = running_cluster.root / "slurm.conf"
    content = configuration.read_text()
    configuration.write_text(content.replace("SlurmdTimeout=10", "SlurmdTimeout=300"))
    running_cluster.run("scontrol", "reconfigure")
    yield
    configuration.write_text(content)
    running_cluster.run("scontrol", "reconfigure")


def end_ranks(tmp_path, code: int) -> None:
    (tmp_path / "code.new").write_text(str(code))
    (tmp_path / "code.new").rename(tmp_path / "code")


def test_a_rank_that_is_stopped_is_ended_with_the_others(cluster, job, tmp_path):
    ranks = [process for process in cluster.processes() if process.command.endswith(f"rank.py {tmp_path}/code")]
    ranks = [process for process in ranks if "srun" not in process.command.split()[0]]
    os.kill(ranks[-1].pid, signal.SIGSTOP)
    end_ranks(tmp_path, 76)
    begun = time.monotonic()
    ended = cluster.wait(job, timeout=100)
    print(f"after {time.monotonic() - begun:.0f} s, with {ended['ExitCode']}")
    assert (ended["JobState"], ended["Restarts"]) == ("FAILED", "0")
    assert time.monotonic() - begun > 50


@pytest.mark.usefixtures("patient")
def test_a_node_that_slurm_still_waits_for_is_missed_by_the_script(cluster, job, tmp_path):
    cluster.power_off(2)
    end_ranks(tmp_path, 1)
    try:
        wait_for(lambda: cluster.job(job)["Restarts"] == "1", 200, lambda: cluster.output(cluster.job(job)))
    finally:
        cluster.power_on(2)
    (tmp_path / "code").unlink()
    wait_for(lambda: (tmp_path / "log").read_text().count("up 1") == 4, 60, lambda: (tmp_path / "log").read_text())
    assert "a node does not answer" in (tmp_path / "log").read_text()
    end_ranks(tmp_path, 0)
    assert cluster.wait(job)["JobState"] == "COMPLETED"


def test_a_node_that_loses_power(cluster, job, tmp_path):
    cluster.power_off(2)
    try:
        wait_for(lambda: cluster.job(job)["Restarts"] == "1", 90, lambda: str(cluster.job(job)))
    finally:
        cluster.power_on(2)
    wait_for(lambda: (tmp_path / "log").read_text().count("up 1") == 4, 60, lambda: (tmp_path / "log").read_text())
    end_ranks(tmp_path, 0)
    assert cluster.wait(job)["JobState"] == "COMPLETED"
