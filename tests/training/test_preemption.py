"""A run that is asked to stop saves, says so, and is gone with its own exit code; resumed, it was never interrupted."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron_ponder.base.errors import EXIT_PREEMPTED, Preempted
from megatron_ponder.base.signals import StopSignals
from megatron_ponder.checkpoint.folders import resolve_checkpoint
from megatron_ponder.checkpoint.manifest import read_manifest
from megatron_ponder.config import read_config
from megatron_ponder.parallel.mesh import Mesh
from megatron_ponder.runs.metrics import read_metrics
from megatron_ponder.runs.run_folder import RunFolder
from megatron_ponder.runs.starts import read_end, read_starts, recorded
from megatron_ponder.training.boundary import Boundary
from megatron_ponder.training.trainer import train
from tests import REPOSITORY
from tests.distributed import run_distributed
from tests.finished_runs import catches, tiny_arguments
from tests.processes import SMALL
from tests.training.test_failures import end_all, start_ranks, wait_for
from tests.training.test_resume import essentials, final_state

STOPPED = r"stopped at step (\d+) by (SIG\w+); checkpoint \S+/step-0*\1; resume with --checkpoint\.resume auto"


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_is_noted_and_handlers_are_put_back(number):
    before = signal.getsignal(number)
    with StopSignals() as signals:
        assert signals.received is None
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), signal.SIGUSR1)
        assert signals.received == number.name
    assert signal.getsignal(number) is before


def test_a_second_ctrl_c_kills():
    program = (
        "import os, signal, time\n"
        "from megatron_ponder.base import signals as module\n"
        "module.SECONDS_OF_ONE_CTRL_C = 0.2\n"
        "with module.StopSignals() as signals:\n"
        "    for pause in (0, 0, 0.3):\n"  # the second comes with the first, as a launcher passes it on
        "        time.sleep(pause)\n"
        "        os.kill(os.getpid(), signal.SIGINT)\n"
        "        print(signals.received, flush=True)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.stdout == "SIGINT\nSIGINT\n"
    assert done.returncode == -signal.SIGINT


def test_a_run_stops_when_another_step_and_a_checkpoint_would_not_fit():
    def stops(left: float | None, step: float, saving: float | None) -> bool:
        boundary = Boundary(StopSignals(), left, Mesh())
        boundary.begin(saving)
        boundary._begun -= step
        assert boundary.cross(torch.ones(2)).tolist() == [1, 1]
        return boundary.stop == "its time limit"

    assert not stops(None, 1e9, 1e9)
    assert not stops(100, 10, 50)
    assert stops(100, 10, 60)
    assert stops(100, 60, 10)
    assert not stops(1000, 1, None)
    assert stops(91, 1, 60)


def test_starts_say_how_the_one_before_ended(tmp_path):
    with RunFolder(tmp_path, "") as folder:
        with recorded(folder, 0, ranks=2):
            assert read_end(tmp_path) is None
        with pytest.raises(KeyError), recorded(folder, 4, ranks=2):
            raise KeyError("a bug")
        assert read_end(tmp_path)["reason"] == "KeyError: 'a bug'"
        (tmp_path / "end.json").unlink()  # as a kill leaves it
        with (tmp_path / "starts.jsonl").open("a") as file:
            file.write('{"time": 1')
        with recorded(folder, 6, ranks=1):
            pass
        with recorded(folder, 8, ranks=1):
            pass
        starts = read_starts(tmp_path)
        assert [start["step"] for start in starts] == [0, 4, 6, 8]
        assert [start["ranks"] for start in starts] == [2, 2, 1, 1]
        assert [start["previous"] for start in starts] == [None, "finished", "killed", "finished"]


def preempt(arguments, ranks, folder, number, rank, line="step 3/", again=False) -> tuple[str, str]:
    """Start, and signal one rank when the first has printed a line, and all of them at once after it if `again`.

    Returns:
        What the first rank has printed in the end, and the signal it says it was: with two under way, whichever came
        to its rank before the ranks agreed to stop.
    """
    folder.mkdir()
    processes = start_ranks(arguments, ranks, folder, failing=None)
    wait_for(lambda: line in (folder / "rank-0").read_text(), processes, seconds=180)
    processes[rank].send_signal(number)
    if again:
        for process in processes:
            process.send_signal(signal.SIGTERM)
    codes = end_all(processes, 60)
    output = (folder / "rank-0").read_text()
    assert codes == [EXIT_PREEMPTED] * ranks, output
    possible = {number.name, signal.SIGTERM.name} if again else {number.name}
    ((_, reason),) = re.findall(STOPPED, output)
    assert reason in possible, output
    assert all("stopped at" not in (folder / f"rank-{other}").read_text() for other in range(1, ranks))
    return output, reason


def finish(arguments, ranks, folder) -> None:
    folder.mkdir()
    assert end_all(start_ranks(arguments, ranks, folder, failing=None), 300) == [0] * ranks


LAYOUTS = [
    pytest.param(2, {"data__num_workers": 1}, id="data"),
    pytest.param(2, {"parallel__zero_stage": 3, "checkpoint__asynchronous": "true"}, id="zero3 asynchronous"),
    pytest.param(4, {"parallel__tensor": 2, "parallel__pipeline": 2}, id="pipeline"),
    pytest.param(1, {"checkpoint__asynchronous": "true"}, id="alone asynchronous"),
]


def test_every_rank_leaves_with_a_code_of_its_own(corpus, tmp_path):
    settings = {"training__steps": 10**6, "data__num_workers": 1, "logging__interval": 1}
    arguments = tiny_arguments(corpus, tmp_path / "run", **settings)
    _, reason = preempt(arguments, 2, tmp_path / "first", signal.SIGUSR1, rank=1, again=True)
    records, manifest = read_metrics(tmp_path / "run"), read_manifest(resolve_checkpoint(tmp_path / "run"))
    assert (manifest.state.step, manifest.state.samples) == (records[-1]["step"], records[-1]["samples"])
    assert read_end(tmp_path / "run")["reason"] == reason


def test_a_signal_while_a_rank_still_imports_is_remembered(corpus, tmp_path):
    arguments = tiny_arguments(corpus, tmp_path / "run", training__steps=10**6)
    command = [sys.executable, "pretrain_ponder.py", *arguments]
    with (tmp_path / "rank-0").open("w") as output:
        process = subprocess.Popen(command, cwd=REPOSITORY, env=os.environ | SMALL, stdout=output, stderr=output)
    wait_for(lambda: catches(process.pid, signal.SIGUSR1), [process], seconds=60)
    assert "libtorch" not in Path(f"/proc/{process.pid}/maps").read_text(), "the handler came late"
    process.send_signal(signal.SIGUSR1)
    assert end_all([process], 120) == [EXIT_PREEMPTED], (tmp_path / "rank-0").read_text()
    assert read_manifest(resolve_checkpoint(tmp_path / "run")).state.step == 1
    assert read_end(tmp_path / "run")["reason"] == "SIGUSR1"


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "layout"), LAYOUTS)
def test_preempted_and_resumed_equals_uninterrupted(corpus, tmp_path, ranks, layout):
    """Signals to one rank and then, while it saves, to all; in a step, and in a validation that goes on afterwards."""
    settings = layout | {
        "training__steps": 60,
        "training__eval_interval": 40,
        "training__eval_samples": 100,
        "checkpoint__interval": 1000,
        "checkpoint__resume": "auto",
        "logging__interval": 1,
    }
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    arguments = tiny_arguments(corpus, broken, **settings)
    _, reason = preempt(arguments, ranks, tmp_path / "first", signal.SIGUSR1, rank=ranks - 1, again=True)
    at = read_manifest(resolve_checkpoint(broken)).state.step
    assert 3 <= at < 40
    output, _ = preempt(arguments, ranks, tmp_path / "second", signal.SIGTERM, rank=0, line=f"step {at + 2}/")
    assert f"going on after step {at}" in output
    finish(arguments, ranks, tmp_path / "third")
    finish(tiny_arguments(corpus, whole, **settings), ranks, tmp_path / "fourth")

    assert [start["previous"] for start in read_starts(broken)] == [None, reason, "SIGTERM"]
    assert read_end(broken)["reason"] == "finished"
    assert essentials(broken) == essentials(whole)
    want, got = final_state(whole), final_state(broken)
    assert want.keys() == got.keys()
    assert all(torch.equal(got[key], tensor) for key, tensor in want.items())


class AfterLooks(StopSignals):
    """A signal that comes between two looks of the loop."""

    def __init__(self, looks: int) -> None:
        self._looks = looks
        super().__init__()

    @property
    def received(self) -> str | None:
        self._looks -= 1
        return "SIGUSR1" if self._looks < 0 else None

    @received.setter
    def received(self, _) -> None:
        pass


def cut_off_in_validation(mesh: Mesh, whole: list[str], broken: list[str]) -> list[tuple[str, int, bool]]:
    """Validation follows the second step and asks three times; the signal comes to the second rank alone."""
    train(read_config(whole), mesh.device)
    seen = []
    # In the second batch of it, in the second of going on with it, in the one by `exact` after the last step, never.
    for looks in (3, 1, 16, 10**9):
        signals = AfterLooks(looks if mesh.data.rank == 1 else 10**9)
        reason = "finished"
        try:
            train(read_config(broken), mesh.device, signals)
        except Preempted as stop:
            reason = stop.reason
        manifest = read_manifest(resolve_checkpoint(read_config(broken).training.run_dir))
        seen.append((reason, manifest.state.step, manifest.state.validated))
        dist.barrier()
    return seen


def test_a_validation_that_is_cut_off_is_made_up_for(corpus, tmp_path):
    settings = {"training__steps": 4, "training__eval_interval": 2, "training__eval_samples": 12}
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    commands = [
        tiny_arguments(corpus, run, checkpoint__resume="auto", checkpoint__interval=4, **settings)
        for run in (whole, broken)
    ]
    for seen in run_distributed(cut_off_in_validation, 2, *commands, time_limit=240):
        stopped = [("SIGUSR1", step, False) for step in (2, 2, 4)]
        assert seen == [*stopped, ("finished", 4, False)]  # nothing is saved after the last
    assert ["validation_loss" in record for record in read_metrics(broken)] == [False, True, False, True]
    assert essentials(broken) == essentials(whole)
