"""The virtual cluster, started once for all tests that run on it, and what each of them must leave behind: nothing."""

import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_ponder.cluster.description import Cluster
from megatron_ponder.cluster.jobs import JOBS, check_job, render
from tests import REPOSITORY
from tests.cluster.runs import long_arguments, succeed
from tests.cluster.virtual_cluster import VirtualCluster, missing_commands, wait_for


@pytest.fixture(scope="session")
def running_cluster(tmp_path_factory) -> Iterator[VirtualCluster]:
    """Two idle nodes."""
    if os.geteuid() != 0 or missing_commands():
        pytest.skip("needs root and SLURM: make test-cluster")
    with VirtualCluster(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster


@pytest.fixture
def cluster(running_cluster) -> Iterator[VirtualCluster]:
    """Two idle nodes; a test that leaves a job or a process on them fails."""
    yield running_cluster
    left = running_cluster.run("squeue", "-h")
    running_cluster.run("scancel", "-u", "root", "-f", check=False)
    ended = f"jobs: {left}"
    wait_for(lambda: not running_cluster.processes(), 20, lambda: f"left behind: {running_cluster.processes()}")
    assert not left, ended


@pytest.fixture
def description(tmp_path) -> Cluster:
    """What a user would say about the virtual cluster."""
    return Cluster(
        nodes=2,
        gpus_per_node=2,
        cpus_per_node=4,
        time="00:10:00",
        signal_seconds=60,
        environment={"PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)},
        log_folder=str(tmp_path),
    )


@pytest.fixture
def submit(cluster, description, tmp_path):
    """Submits a job of `ponder submit`, without starting that; returns the job's number.

    What the cluster is asked for can be changed: `submit("train", *arguments, nodes=1)`.
    """

    def submit(name: str, *arguments: str | Path, after: int | None = None, **changes) -> int:
        asked, words = replace(description, **changes), [str(argument) for argument in arguments]
        check_job(JOBS[name], asked, words)
        script = tmp_path / f"{name}.sh"
        script.write_text(render(JOBS[name], asked, words, REPOSITORY, after))
        return cluster.submit(script)

    return submit


@pytest.fixture(scope="session")
def whole(tmp_path_factory) -> Path:
    """Where the run that nothing interrupts has its folder, once a test has made it."""
    return tmp_path_factory.mktemp("whole") / "run"


@pytest.fixture
def uninterrupted(submit, cluster, corpus, whole) -> Path:
    """A run of `long_arguments` on both nodes that nothing interrupts."""
    if not whole.exists():
        succeed(cluster, submit("train", *long_arguments(corpus, whole)))
    return whole
