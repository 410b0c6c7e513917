"""The command that says how runs are doing."""

import json
import time
from functools import partial

import pytest

from tests.finished_runs import LATEST, STEPS, finished_runs


@pytest.fixture
def status(ponder):
    """Runs the command in this process."""
    return partial(ponder, "status")


def test_a_table_of_several_runs(status, corpus, tmp_path):
    runs = finished_runs(corpus)
    (tmp_path / "config.yaml").write_text((runs.whole / "config.yaml").read_text())
    done = status(runs.whole, tmp_path)
    assert done.code == 0, done.err
    lines = {line.split("│")[1].strip(): line.split("│")[2:4] for line in done.out.splitlines() if "│" in line}
    assert lines["state"][0].startswith(" finished, last record ")
    assert lines["state"][1].strip() == "not started"
    assert lines["step"][0].strip() == f"{STEPS} of {STEPS} (100%)"
    assert lines["step"][1].strip() == "–"
    assert LATEST in lines["checkpoint"][0]
    assert "complete" in lines["checkpoint"][0]
    assert lines["checkpoint"][1].strip() == "none"


def test_json_and_the_exit_code_of_a_silent_run(status, corpus, tmp_path):
    (tmp_path / "config.yaml").write_text("training: {steps: 9, global_batch_size: 1}\ndata: {sequence_length: 1}\n")
    record = {"step": 3, "loss": 1.0, "time": time.time() - 5000, "step_seconds": 1.0}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(record) + "\n")
    (tmp_path / "starts.jsonl").write_text('{"step": 0}\n{"step": 2, "host": "n1", "previous": "SIGTERM"}\n')
    done = status(tmp_path, finished_runs(corpus).whole, "--json")
    assert done.code == 1
    silent, finished = map(json.loads, done.out.splitlines())
    assert (silent["state"], silent["restarts"], finished["state"]) == ("silent", 1, "finished")
    assert finished["checkpoint"]["complete"] is True
    assert "1, the last after step 2 on n1 (SIGTERM)" in status(tmp_path).out


def test_a_run_that_has_stopped(status, tmp_path):
    (tmp_path / "config.yaml").write_text("training: {steps: 9, global_batch_size: 1}\ndata: {sequence_length: 1}\n")
    (tmp_path / "metrics.jsonl").write_text('{"step": 3, "loss": null, "time": 1.0, "step_seconds": 1.0}\n')
    (tmp_path / "end.json").write_text('{"time": 2.0, "reason": "SIGUSR1"}')
    done = status(tmp_path)
    assert done.code == 0, done.err
    assert "stopped (SIGUSR1), last record" in done.out
    assert "not finite" in done.out


def test_watching_ends_with_the_runs(status, corpus):
    done = status(finished_runs(corpus).whole, "--watch", "1")
    assert done.code == 0, done.err
    assert "finished" in done.out


def test_what_is_no_run_is_left_out_and_said(status, corpus, tmp_path):
    (tmp_path / "notes.txt").touch()
    (tmp_path / "empty").mkdir()
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "config.yaml").write_bytes(b"\xff")
    names = [tmp_path / "damaged", tmp_path / "empty", finished_runs(corpus).whole, tmp_path / "notes.txt"]
    for option in ([], ["--watch", "1"]):
        done = status(*names, *option)
        assert done.code == 0
        assert "finished" in done.out
        lines = done.err.splitlines()
        assert len(lines) == 3
        assert all(line.startswith("left out: ") and str(tmp_path) in line for line in lines)
    assert len(status(*names, "--json").out.splitlines()) == 1
    done = status(*names[:2])
    assert done.code == 2
    assert "config.yaml is not UTF-8 text" in done.err and done.err.endswith(" (and 1 more that are none)\n")


def test_what_cannot_be_read(status, tmp_path):
    for arguments, message in (
        ([tmp_path], "is not a run folder"),
        ([tmp_path, "--watch", "1", "--json"], "leave --json out"),
    ):
        done = status(*arguments)
        assert done.code == 2
        assert done.err.startswith("error: ")
        assert message in done.err
        assert done.err.count("\n") == 1
