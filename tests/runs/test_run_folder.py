"""One run at a time writes to a run folder, and what somebody removes meanwhile is made again."""

import json
import logging
import shutil
from collections.abc import Callable

import pytest

from megatron_ponder.base.signals import StopSignals
from megatron_ponder.checkpoint.folders import resolve_checkpoint
from megatron_ponder.parallel.mesh import Mesh
from megatron_ponder.runs.lasting_file import LastingFile
from megatron_ponder.runs.metrics import read_metrics
from megatron_ponder.runs.run_folder import OWNER, RunFolder
from megatron_ponder.runs.run_log import RUN_LOG
from megatron_ponder.runs.starts import read_end
from tests.finished_runs import LATEST, alone, contents, refused, tiny_arguments
from tests.training.test_faults import Attempt, attempt


class AtLook(StopSignals):
    """Does something when the loop looks for a signal the n-th time, and brings none."""

    def __init__(self, looks: int, action: Callable[[], None]) -> None:
        self._looks, self._action = looks, action
        super().__init__()

    @property
    def received(self) -> None:
        self._looks -= 1
        if self._looks == 0:
            self._action()

    @received.setter
    def received(self, _) -> None:
        pass


def run_with(arguments: list[str], looks: int, action: Callable[[], None], drawn: bool = False) -> Attempt:
    with alone() as device:
        return attempt(Mesh(device=device), arguments, AtLook(looks, action), drawn)


def test_a_second_run_is_refused_and_changes_nothing(corpus, tmp_path):
    run = tmp_path / "run"
    with RunFolder(run, "model: {}\n") as folder:
        folder.write_config()
        before = contents(run)
        message = refused(tiny_arguments(corpus, run, checkpoint__resume="auto"))
        owner = json.loads((run / OWNER).read_text())
        assert f"{run} is in use by process {owner['pid']} on {owner['host']}" in message
        assert "choose another --training.run_dir" in message
        assert contents(run) == before
    assert [path.name for path in run.iterdir()] == ["config.yaml"]


def test_a_run_that_is_refused_leaves_no_folder(corpus, tmp_path):
    refused(tiny_arguments(corpus, tmp_path / "run", checkpoint__resume=tmp_path / "nowhere"))
    assert not (tmp_path / "run").exists()


def test_a_run_whose_folder_is_another_run_s_by_now_leaves_it_alone(corpus, tmp_path):
    run, seen = tmp_path / "run", {}

    def take() -> None:
        about = json.loads((run / OWNER).read_text()) | {"nonce": "another", "host": "node-7"}
        (run / OWNER).write_text(json.dumps(about))
        seen.update(contents(run / "checkpoints"))

    end = run_with(tiny_arguments(corpus, run, checkpoint__interval=2, training__eval_interval=0), 6, take).end
    assert "is not held by this process any more" in end and "on node-7" in end
    assert seen and contents(run / "checkpoints") == seen
    assert read_end(run) is None


def test_a_run_whose_folder_is_removed_makes_it_again_and_loses_nothing(corpus, tmp_path, caplog):
    run = tmp_path / "run"
    arguments = tiny_arguments(corpus, run, logging__tensorboard="true", training__eval_interval=0)
    with caplog.at_level(logging.WARNING):
        assert run_with(arguments, 6, lambda: shutil.rmtree(run), drawn=True).end == "finished"
    assert any("metrics.jsonl was removed" in message for message in caplog.messages)
    assert [record["step"] for record in read_metrics(run)] == list(range(1, 9))
    assert "starting: llama" in (run / RUN_LOG).read_text()
    assert resolve_checkpoint(run).name == LATEST
    assert list(run.glob("events.out.tfevents.*"))
    left = {path.name for path in run.iterdir()}
    assert left >= {"config.yaml", "end.json", "training.png"} and OWNER not in left
    with alone() as device:
        resumed = attempt(Mesh(device=device), [*arguments, "--checkpoint.resume=auto", "--training.steps=9"])
    assert resumed.end == "finished"


@pytest.mark.parametrize("replaced", [False, True])
def test_a_file_that_is_removed_or_replaced_goes_on(tmp_path, replaced):
    path = tmp_path / "a" / "log"
    path.parent.mkdir()
    file = LastingFile(path)
    assert not file.append(b"one\n")
    shutil.rmtree(path.parent)
    if replaced:
        path.parent.mkdir()
        path.write_text("other\n")
    assert file.append(b"two\n")
    assert not file.append(b"three\n")
    file.shorten(6)
    file.close()
    assert path.read_text() == ("other\n" if replaced else "one\n") + "two\n"
