"""Jobs of examples/slurm on two real nodes of a virtual SLURM."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cluster.conftest import REPOSITORY
from tests.runs import tiny_arguments

pytestmark = pytest.mark.cluster

LAYOUT = {"parallel__tensor": 2, "parallel__sequence_parallel": "true"}


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def one_process(arguments: list[str]) -> None:
    command = [sys.executable, str(REPOSITORY / "pretrain_ponder.py"), *arguments]
    subprocess.run(command, check=True, capture_output=True, timeout=200)


def test_srun(submit, cluster, corpus, tmp_path):
    one_process(tiny_arguments(corpus, tmp_path / "alone"))
    job = cluster.wait(submit("train", *tiny_arguments(corpus, tmp_path / "run", **LAYOUT)))
    print(cluster.output(job))
    assert (job["JobState"], job["ExitCode"]) == ("COMPLETED", "0:0"), cluster.output(job)
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "alone"), rel=1e-5)
