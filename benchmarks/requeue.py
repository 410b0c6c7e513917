"""How long a job needs to end when a rank dies, and to train again when it is told to leave, on the virtual cluster.

    python benchmarks/requeue.py [--rounds 3]

Starts a SLURM of two nodes in namespaces of this machine (as root; see tests/cluster), and a tiny model on two ranks of
each node. Times are medians over rounds, in seconds; those of starting Python and DeepSpeed are this machine's, those
of SLURM follow from its settings in tests/cluster/virtual_cluster.py.
"""

import argparse
import json
import os
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

from benchmarks.small_corpus import SmallCorpus, small_corpus  # noqa: E402
from megatron_ponder.base.errors import UserError, command  # noqa: E402
from megatron_ponder.cluster.description import Cluster  # noqa: E402
from megatron_ponder.cluster.jobs import JOBS, render  # noqa: E402
from tests.cluster.runs import long_arguments  # noqa: E402
from tests.cluster.virtual_cluster import VirtualCluster, missing_commands, wait_for  # noqa: E402


@command
def main(argv: Sequence[str]) -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args(argv).rounds
    if os.geteuid() != 0 or missing_commands():
        raise UserError("a virtual cluster needs root and SLURM; run tests/cluster/install.sh first")
    with tempfile.TemporaryDirectory() as name, VirtualCluster(Path(name) / "slurm") as cluster:
        corpus = small_corpus(Path(name))
        results = [_round(cluster, corpus, Path(name) / f"round{number}") for number in range(rounds)]
    table = Table(title=f"median of {rounds} rounds, 2 nodes × 2 ranks")
    table.add_column("from … to …", no_wrap=True)
    table.add_column("seconds", justify="right")
    for part in results[0]:
        table.add_row(part, f"{statistics.median(result[part] for result in results):.1f}")
    Console().print(table)


def _round(cluster: VirtualCluster, corpus: SmallCorpus, folder: Path) -> dict[str, float]:
    folder.mkdir()
    environment = {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    description = Cluster(nodes=2, gpus_per_node=2, environment=environment, log_folder=str(folder))
    run, script = folder / "run", folder / "job.sh"
    # longer than anything that is measured
    arguments = long_arguments(corpus, run, training__steps=100_000, checkpoint__interval=1000)
    script.write_text(render(JOBS["train"], description, arguments, REPOSITORY))
    job = cluster.submit(script)
    times = {"start": time.monotonic()}
    _steps(run, 5)
    times["trains"] = time.monotonic()
    cluster.run("scancel", "--batch", "--signal=USR1", str(job))
    times["told"] = time.monotonic()
    times["saved"] = _when(lambda: (run / "end.json").exists(), "a checkpoint")
    times["pending"] = _when(lambda: cluster.job(job)["JobState"] == "PENDING", "the queue")
    times["running"] = _when(lambda: cluster.job(job)["JobState"] == "RUNNING", "a second start")
    times["resumed"] = _when(lambda: len(_starts(run)) == 2, "all ranks to be there")
    _steps(run, _starts(run)[1]["step"] + 1)
    times["new step"] = time.monotonic()
    _steps(run, _starts(run)[1]["step"] + 5)
    os.kill(cluster.ranks(job)[3].pid, signal.SIGKILL)
    times["killed"] = time.monotonic()
    times["ended"] = _when(lambda: cluster.job(job)["JobState"] == "FAILED", "the end of the job")
    parts = {
        "submission … fifth step": ("start", "trains"),
        "USR1 … checkpoint": ("told", "saved"),
        "checkpoint … all ranks ended, job back in the queue": ("saved", "pending"),
        "queue … running (credentials expire after 5 s here)": ("pending", "running"),
        "running … ranks have resumed": ("running", "resumed"),
        "resumed … first new step": ("resumed", "new step"),
        "USR1 … first new step": ("told", "new step"),
        "SIGKILL of a rank … end of the job": ("killed", "ended"),
    }
    return {name: times[end] - times[begin] for name, (begin, end) in parts.items()}


def _when(condition: Callable[[], bool], what: str) -> float:
    wait_for(condition, 120, lambda: f"waited for {what}")
    return time.monotonic()


def _steps(run: Path, count: int) -> None:
    """Wait until a step has been recorded."""
    metrics = run / "metrics.jsonl"
    wait_for(lambda: metrics.exists() and metrics.read_bytes().count(b"\n") >= count, 120, lambda: f"step {count}")


def _starts(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "starts.jsonl").read_text().splitlines()]


if __name__ == "__main__":
    main()
