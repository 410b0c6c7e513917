"""Exports beside training: told of in a line, whole or not there, and made later where they were cut off.

What is exported is looked at in `test_checkpointer.py`, after a real run.
"""

import errno
import multiprocessing
import os
import signal
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_ponder.base.errors import UserError
from megatron_ponder.checkpoint.folders import MANIFEST, checkpoint_name, export_of, exports_due, note_export, retain
from megatron_ponder.training import exporter
from megatron_ponder.training.exporter import Exporter
from tests.config.test_sections import refusal


def export_as_told(checkpoint: Path, output: Path, dtype: str) -> None:
    """Do what a file of the checkpoint says, in the place of an export."""
    told = (checkpoint / "told").read_text()
    if told == "fail":
        raise UserError("the disk is full")
    if told == "die":
        os._exit(9)
    if told == "stop":
        signal.signal(signal.SIGUSR1, signal.SIG_DFL)  # as before this process has come so far
        os.kill(os.getpid(), signal.SIGUSR1)
    if told == "sleep":
        (checkpoint / "pid").write_text(f"{os.getpid()}")
        time.sleep(60)
    output.with_name(".hf.partial").rename(output)
    (output / dtype).touch()


@pytest.fixture(autouse=True)
def quick(monkeypatch) -> None:
    """Processes that are forked, in which transformers need not be imported."""
    monkeypatch.setattr(exporter, "START_METHOD", "fork")
    monkeypatch.setitem(sys.modules, "megatron_ponder.hf.export", SimpleNamespace(export_checkpoint=export_as_told))


def checkpoints(folder: Path, *told: str) -> list[Path]:
    """Complete checkpoints whose export is due."""
    made = []
    for step, what in enumerate(told, 1):
        path = folder / checkpoint_name(step)
        path.mkdir()
        (path / MANIFEST).touch()
        (path / "told").write_text(what)
        note_export(path)
        made.append(path)
    return made


def begun(*paths: Path) -> Exporter:
    running = Exporter("bfloat16", None, 8)
    for path in paths:
        running.begin(path)
    return running


def test_exports_follow_each_other_and_a_failure_is_a_line(tmp_path):
    first, second, third, fourth = checkpoints(tmp_path, "export", "fail", "die", "export")
    running = begun(first, second, third, fourth)
    running.finish()
    saved = "is saved but not exported, training goes on:"
    assert list(running.news()) == [
        f"exported {first / 'hf'}",
        f"warning: {second} {saved} the disk is full",
        f"warning: {third} {saved} its process has ended with code 9",
        f"exported {fourth / 'hf'}",
    ]
    assert list(running.news()) == []
    assert (first / "hf" / "bfloat16").is_file()
    assert exports_due(tmp_path) == []
    assert sorted(path.name for path in second.iterdir()) == ["manifest.json", "told"]
    retain(tmp_path, 1)  # an export goes with its checkpoint
    assert list(tmp_path.glob("**/hf")) == [fourth / "hf"]


def test_what_is_cut_off_is_made_by_the_next_start(tmp_path):
    first, second, third = checkpoints(tmp_path, "sleep", "export", "stop")
    stopped = begun(third)
    stopped.finish()
    running = begun(first, second)
    while not (first / "pid").exists():
        time.sleep(0.01)
    running.cut_off()
    ends = "is not finished; it is made when the run goes on"
    assert list(stopped.news()) == [f"the export {third / 'hf'} {ends}"]
    assert list(running.news()) == [f"the export {path / 'hf'} {ends}" for path in (first, second)]
    assert exports_due(tmp_path) == [first, second, third]
    for path in (first, third):
        (path / "told").write_text("export")
    again = begun()
    again.begin_all_due(tmp_path)
    again.finish()
    assert list(again.news()) == [f"exported {path / 'hf'}" for path in (first, second, third)]
    assert exports_due(tmp_path) == []
    assert export_of(first).is_dir()


def test_a_process_that_cannot_be_started_is_a_line(tmp_path, monkeypatch):
    def refused(*_, **__) -> None:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    (checkpoint,) = checkpoints(tmp_path, "export")
    monkeypatch.setattr(multiprocessing.get_context("fork").Process, "start", refused)
    running = begun(checkpoint)
    running.finish()
    (line,) = running.news()
    assert line.endswith("is saved but not exported, training goes on: Cannot allocate memory")


def test_nobody_waits_for_processes_that_were_forked_meanwhile(tmp_path, monkeypatch):
    """As those that read data are, in another thread than that of exports: they hold what an export would answer by."""
    context, held = multiprocessing.get_context(exporter.START_METHOD), []
    real = context.Pipe

    def pipe(duplex: bool) -> tuple:
        answer, sender = real(duplex=duplex)
        held.append(os.dup(sender.fileno()))
        return answer, sender

    monkeypatch.setattr(context, "Pipe", pipe, raising=False)
    first, second = checkpoints(tmp_path, "export", "fail")
    running = begun(first, second)
    waiting = threading.Thread(target=running.finish, daemon=True)
    waiting.start()
    waiting.join(60)
    assert not waiting.is_alive() and len(held) == 2
    assert [line.endswith(("/hf", "the disk is full")) for line in running.news()] == [True, True]
    for descriptor in held:
        os.close(descriptor)


def test_an_export_ends_with_its_run(tmp_path):
    (checkpoint,) = checkpoints(tmp_path, "sleep")
    run = multiprocessing.get_context("fork").Process(target=lambda: begun(checkpoint).finish())
    run.start()
    while not (checkpoint / "pid").exists() or not (checkpoint / "pid").read_text():
        time.sleep(0.01)
    pid = int((checkpoint / "pid").read_text())
    run.kill()
    run.join()
    deadline = time.monotonic() + 10
    while Path(f"/proc/{pid}").exists() and "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2][:3]:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_tokenizer_that_cannot_be_exported_is_refused_at_the_start(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError):
        Exporter("float32", tmp_path, 8)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"checkpoint.export_hf": "true"}, "write float32 or bfloat16"),
        ({"checkpoint.export_hf": "float32", "data.reset_at_eod": "true"}, "set tokenizer.path"),
        (
            {"checkpoint.export_hf": "float32", "ponder.mode": "adaptive", "ponder.router_input": "token"},
            "leave checkpoint.export_hf out",
        ),
    ],
)
def test_what_cannot_be_exported_is_refused(given, said):
    assert said in refusal([f"--{key}={value}" for key, value in given.items()])
