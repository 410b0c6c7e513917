"""A rank that dies takes the job down, soon and with its own error shown, whatever launched it."""

import itertools
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_ponder.commands.ponder import start
from megatron_ponder.data.dataset import TokenDataset
from megatron_ponder.runs.metrics import read_metrics
from megatron_ponder.training.deepspeed_engine import Engine
from tests import REPOSITORY
from tests.finished_runs import tiny_arguments
from tests.processes import SMALL, Forked, environments

SECONDS = 60


def fail_in_third_step() -> None:
    """The program of a rank."""
    numbers, real = itertools.count(1), Engine.step

    def step(engine: Engine, learning_rate: float) -> float:
        if next(numbers) == 5:  # the first is taken when the engine is made
            raise ArithmeticError("the sky is falling on this rank")
        return real(engine, learning_rate)

    Engine.step = step
    start()


def start_ranks(arguments: list[str], ranks: int, folder: Path, failing: int | None) -> list[Forked]:
    """Without a launcher, which would end the others itself."""
    processes = []
    for rank, env in enumerate(environments(ranks)):
        program = fail_in_third_step if rank == failing else start
        with (folder / f"rank-{rank}").open("w") as output:
            streams = {"stdout": output, "stderr": subprocess.STDOUT}
            processes.append(Forked("train", *arguments, program=program, env=env, **streams))
    return processes


def wait_for(condition, processes: list[Forked], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    try:
        while not condition():
            assert time.monotonic() < deadline, "it took too long"
            ended = any(process.poll() is not None for process in processes)
            assert not ended or condition(), "a rank ended too early"
            time.sleep(0.1)
    except AssertionError:
        for process in processes:  # or they train on without end
            process.kill()
        raise


def end_all(processes: list[Forked], seconds: float) -> list[int]:
    """Exit codes of ranks that are given so many seconds to end by themselves."""
    deadline = time.monotonic() + seconds
    try:
        return [process.wait(max(0.1, deadline - time.monotonic())) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()


@pytest.mark.parametrize(("tensor", "pipeline"), [(1, 2), (2, 1)], ids=["pipeline", "tensor"])
def test_an_error_of_one_rank_ends_all(corpus, tmp_path, tensor, pipeline):
    layout = {"parallel__tensor": tensor, "parallel__pipeline": pipeline, "training__steps": 10**6}
    arguments = tiny_arguments(corpus, tmp_path / "run", **layout)
    processes = start_ranks(arguments, 2, tmp_path, failing=1)
    own = tmp_path / "rank-1"
    wait_for(lambda: "the sky is falling" in own.read_text(), processes, seconds=120)
    codes = end_all(processes, SECONDS)
    assert all(code != 0 for code in codes)
    assert "ArithmeticError: the sky is falling on this rank" in own.read_text()
    other = (tmp_path / "rank-0").read_text()
    assert "rank 0: ended, because rank 1 failed: ArithmeticError: the sky is falling on this rank" in other
    assert "Traceback" not in other
    assert [record["step"] for record in read_metrics(tmp_path / "run")] == [1, 2, 3]


def fail_to_read() -> None:
    """The program of a rank whose data cannot be read from some sample on, for a reason that nobody has thought of."""
    real = TokenDataset.read

    def read(dataset: TokenDataset, position: int, *arguments):
        if 12 <= position < 1000:
            raise KeyError("the colour of this sample")
        return real(dataset, position, *arguments)

    TokenDataset.read = read
    start()


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_what_goes_wrong_in_a_process_that_reads_ends_all(corpus, tmp_path, ranks):
    layout = {"parallel__pipeline": ranks, "training__steps": 10**6, "data__num_workers": 2}
    arguments = tiny_arguments(corpus, tmp_path / "run", **layout)
    with (tmp_path / "output").open("w") as output:
        streams = {"stdout": output, "stderr": subprocess.STDOUT}
        processes = [
            Forked("train", *arguments, program=fail_to_read, env=env, **streams) for env in environments(ranks)
        ]
    wait_for(lambda: "has failed: KeyError: 'the colour" in (tmp_path / "output").read_text(), processes, seconds=120)
    assert end_all(processes, SECONDS) == [1] * ranks


@pytest.mark.slow
def test_a_killed_rank_ends_all(corpus, tmp_path):
    layout = {"parallel__tensor": 2, "parallel__pipeline": 2, "training__steps": 10**6, "logging__interval": 1}
    processes = start_ranks(tiny_arguments(corpus, tmp_path / "run", **layout), 4, tmp_path, failing=None)
    wait_for(lambda: "step 2/" in (tmp_path / "rank-0").read_text(), processes, seconds=180)
    processes[2].kill()
    codes = end_all(processes, SECONDS)
    assert codes[2] == -signal.SIGKILL
    assert all(code != 0 for code in codes)


@pytest.mark.slow
def test_torchrun_shows_which_rank_was_killed(corpus, tmp_path):
    layout = {"parallel__pipeline": 2, "training__steps": 10**6, "logging__interval": 1}
    arguments = tiny_arguments(corpus, tmp_path / "run", **layout)
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "pretrain_ponder.py", *arguments]
    output = (tmp_path / "output").open("w+")
    job = subprocess.Popen(launch, cwd=REPOSITORY, env=os.environ | SMALL, stdout=output, stderr=subprocess.STDOUT)
    wait_for(lambda: "step 2/" in (tmp_path / "output").read_text(), [job], seconds=180)
    children = subprocess.run(["pgrep", "-P", str(job.pid)], capture_output=True, text=True, check=True).stdout.split()
    os.kill(int(children[1]), signal.SIGKILL)
    (code,) = end_all([job], SECONDS)
    assert code != 0
    assert re.search(r"exitcode\s*:\s*-9", (tmp_path / "output").read_text())
