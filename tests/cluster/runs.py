"""Training runs that tests of the cluster start, and what they say."""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from tests import REPOSITORY
from tests.cluster.virtual_cluster import VirtualCluster, wait_for
from tests.finished_runs import contents, tiny_arguments

# On two nodes with two ranks each: the tensor ranks on a node, the data ranks on both.
TWO_BY_TWO = {"parallel__tensor": 2, "parallel__sequence_parallel": "true"}
LONG = {"training__steps": 40, "training__eval_interval": 0, "checkpoint__interval": 5, "logging__interval": 1}


def long_arguments(corpus, run_dir: Path, **overrides) -> list[str]:
    """A command line of a run that lasts long enough to be interrupted, on two tensor ranks and two data ranks."""
    return tiny_arguments(corpus, run_dir, **(TWO_BY_TWO | LONG | overrides))


def one_process(arguments: Sequence[str | Path], script: str = "pretrain_ponder.py") -> str:
    """Run a command of the repository outside of the cluster, and return what it printed."""
    done = subprocess.run(
        [sys.executable, str(REPOSITORY / script), *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=REPOSITORY,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def losses(run: Path) -> list[float]:
    """The loss of every step that a run has recorded."""
    return [json.loads(line)["loss"] for line in _lines(run)]


def steps(run: Path) -> int:
    """How many steps a run has recorded."""
    return len(_lines(run))


def succeed(cluster: VirtualCluster, job: int, timeout: float = 200) -> str:
    """Wait for a job that has to succeed, and return what it printed."""
    ended = cluster.wait(job, timeout=timeout)
    output = cluster.output(ended)
    assert (ended["JobState"], ended["ExitCode"]) == ("COMPLETED", "0:0"), output
    return output


def wait_for_steps(cluster: VirtualCluster, job: int, run: Path, count: int) -> None:
    """Wait until a run has recorded so many steps."""
    wait_for(lambda: steps(run) >= count, 120, lambda: f"{count} steps: {cluster.output(cluster.job(job))}")


def _lines(run: Path) -> list[str]:
    metrics = run / "metrics.jsonl"
    text = metrics.read_text() if metrics.exists() else ""
    return text[: text.rfind("\n") + 1].splitlines()  # without a line that is being written


def starts(run: Path) -> list[dict]:
    """Every start of a run: the step it began at, and how the one before had ended."""
    return [json.loads(line) for line in (run / "starts.jsonl").read_text().splitlines()]


def latest_files(run: Path) -> dict[str, bytes]:
    """The weights and moments of a run's last checkpoint."""
    checkpoints = run / "checkpoints"
    found = contents(checkpoints / (checkpoints / "latest").read_text().strip())
    return {name: content for name, content in found.items() if name.endswith(".safetensors")}


def assert_same_run(run: Path, uninterrupted: Path) -> None:
    """Every loss, and the weights and moments at the end, are those of the run that nothing has interrupted."""
    assert losses(run) == losses(uninterrupted)
    assert latest_files(run) == latest_files(uninterrupted)
