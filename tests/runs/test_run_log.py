"""What a run says, in its log."""

import re
import sys

import pytest

from megatron_ponder.base.errors import UserError
from megatron_ponder.runs.progress_bar import RunProgress
from megatron_ponder.runs.run_log import RUN_LOG, RunLog
from tests.runs.records import record


def test_the_log_has_every_line_with_the_time_over_all_starts(tmp_path, capsys):
    for first in (0, 20):
        with RunProgress(total_steps=40, first_step=first, interval=10, log=RunLog(tmp_path)) as progress:
            progress.say(f"from {first}\n  two lines")
            for step in range(first + 1, first + 21):
                progress.update(record(step))
    shown = capsys.readouterr().out.splitlines()
    lines = (tmp_path / RUN_LOG).read_text().splitlines()
    assert all(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d  ", line) for line in lines)
    assert [line[21:] for line in lines] == shown
    assert [line.split("  ")[0] for line in shown if line.startswith("step")] == [
        f"step {n}/40" for n in (10, 20, 30, 40)
    ]
    assert shown[:2] == ["from 0", "  two lines"]


def test_a_terminal_has_its_lines_in_the_log_as_well(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    with RunProgress(total_steps=2, first_step=0, interval=1, log=RunLog(tmp_path)) as progress:
        progress.say("starting")
        progress.update(record(1))
    text = (tmp_path / RUN_LOG).read_text()
    assert "starting" in text
    assert "step 1/2  loss 6.0000" in text


def test_the_log_says_why_a_run_stopped(tmp_path):
    with pytest.raises(UserError), RunProgress(3, 0, 1, log=RunLog(tmp_path)):
        raise UserError("no space left; free some")
    assert (tmp_path / RUN_LOG).read_text().rstrip().endswith("stopped: UserError: no space left; free some")


def test_a_full_disk_costs_lines_of_the_log_and_not_the_run(tmp_path):
    log = RunLog(tmp_path)
    log._file._file = open("/dev/full", "ab", buffering=0)  # noqa: SIM115
    log.write("lost")
    log.close()
