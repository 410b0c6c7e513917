"""How far a run is, on a terminal and elsewhere."""

import io
import sys

import pytest

from megatron_ponder.runs.progress_bar import RunProgress
from megatron_ponder.runs.run_log import RUN_LOG, RunLog
from tests.runs.records import record


def test_plain_lines_where_there_is_no_terminal(capsys):
    with RunProgress(total_steps=25, first_step=0, interval=10) as progress:
        progress.say("starting")
        for step in range(1, 26):
            progress.update(record(step))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "starting"
    assert [line.split("  ")[0] for line in lines[1:]] == ["step 10/25", "step 20/25", "step 25/25"]
    assert lines[1] == "step 10/25  loss -3.0000  latent steps/token 1.50  1,234 tokens/s  left 0:00:00"


def test_a_bar_on_a_terminal(capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "140")
    with RunProgress(total_steps=4, first_step=2, interval=1) as progress:
        progress.say("step 2  saved runs/[a]")
        progress.update(record(3))
    out = capsys.readouterr().out
    assert "step 2  saved runs/[a]" in out
    assert "3/4" in out
    assert "latent steps/token 1.50" in out


class Unwritable(io.StringIO):
    def write(self, text: str) -> int:
        raise BrokenPipeError(32, "Broken pipe")


@pytest.mark.parametrize("closed", [False, True])
def test_standard_output_that_cannot_be_written_costs_lines_and_not_the_run(tmp_path, monkeypatch, closed):
    stream = Unwritable()
    if closed:
        stream.close()
        monkeypatch.setattr(Unwritable, "isatty", lambda _: False)
    monkeypatch.setattr(sys, "stdout", stream)
    with RunProgress(4, 0, interval=1, log=RunLog(tmp_path)) as progress:
        progress.say("starting")
        for step in (1, 2):
            progress.update(record(step))
    lines = [line.split("  ", 1)[1] for line in (tmp_path / RUN_LOG).read_text().splitlines()]
    assert lines[0] == "starting"
    assert lines[1].startswith("standard output cannot be written, training goes on: ")
    assert [line[:8] for line in lines[2:]] == ["step 1/4", "step 2/4"]
