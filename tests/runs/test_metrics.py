"""What a run writes about itself."""

import io
import json
import re
import sys

import pytest

from megatron_ponder.base.errors import UserError
from megatron_ponder.config import LoggingConfig
from megatron_ponder.runs.metrics import (
    METRICS,
    RUN_LOG,
    MetricsLog,
    RunLog,
    RunProgress,
    read_metrics,
)

PLAIN = LoggingConfig(tensorboard=False)


def record(step: int, **more) -> dict:
    return {"step": step, "loss": 7.0 - step, "mean_steps": 1.5, "tokens_per_second": 1234.0} | more


def write(run_dir, steps, first_step=0, config=PLAIN, **more):
    log = MetricsLog(run_dir, config, first_step)
    for step in steps:
        log.write(record(step, **more))
    log.close()


def steps_of(run_dir) -> list[int]:
    return [entry["step"] for entry in read_metrics(run_dir)]


def test_records_come_back_as_they_were_written(tmp_path):
    write(tmp_path, [1], step_histogram=[3, 4, 5])
    assert read_metrics(tmp_path) == [record(1, step_histogram=[3, 4, 5])]
    line = (tmp_path / METRICS).read_text()
    assert line.endswith("}\n")
    assert json.loads(line)["step"] == 1


def test_every_record_is_on_disk_at_once(tmp_path):
    log = MetricsLog(tmp_path, PLAIN, 0)
    log.write(record(1))
    assert steps_of(tmp_path) == [1]
    log.close()


def test_records_after_the_resumed_step_are_dropped(tmp_path):
    write(tmp_path, range(1, 8))
    write(tmp_path, [5, 6], first_step=4, again=True)
    assert steps_of(tmp_path) == [1, 2, 3, 4, 5, 6]
    assert ["again" in entry for entry in read_metrics(tmp_path)] == [False] * 4 + [True] * 2
    write(tmp_path, [1])
    assert steps_of(tmp_path) == [1]
    assert [path.name for path in tmp_path.iterdir()] == [METRICS]


@pytest.mark.parametrize("kept", [1, 20, -2])
def test_a_last_line_cut_off_by_a_crash_is_left_out(tmp_path, kept):
    write(tmp_path, [1, 2, 3])
    path = tmp_path / METRICS
    whole, last = path.read_text().splitlines()[:2], path.read_text().splitlines()[2]
    path.write_text("\n".join([*whole, last[:kept]]))
    assert steps_of(tmp_path) == [1, 2]
    write(tmp_path, [3], first_step=2)
    assert steps_of(tmp_path) == [1, 2, 3]


def test_tensorboard_gets_the_numbers(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = LoggingConfig(tensorboard=True)
    write(tmp_path, [1, 2, 3], config=config, step_histogram=[1, 2])
    write(tmp_path, [3, 4], first_step=2, config=config)
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert set(events.Tags()["scalars"]) == {"loss", "mean_steps", "tokens_per_second"}
    losses = events.Scalars("loss")
    assert [(event.step, event.value) for event in losses] == [(1, 6.0), (2, 5.0), (3, 4.0), (4, 3.0)]


def test_plain_lines_where_there_is_no_terminal(capsys):
    with RunProgress(total_steps=25, first_step=0, interval=10, shown=True) as progress:
        progress.say("starting")
        for step in range(1, 26):
            progress.update(record(step))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "starting"
    assert [line.split("  ")[0] for line in lines[1:]] == ["step 10/25", "step 20/25", "step 25/25"]
    assert lines[1] == "step 10/25  loss -3.0000  steps/token 1.50  1,234 tokens/s  left 0:00:00"


def test_other_ranks_are_silent(capsys):
    with RunProgress(total_steps=2, first_step=0, interval=1, shown=False) as progress:
        progress.say("starting")
        progress.update(record(1))
    assert capsys.readouterr() == ("", "")


def test_a_bar_on_a_terminal(capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "140")
    with RunProgress(total_steps=4, first_step=2, interval=1, shown=True) as progress:
        progress.say("step 2  saved runs/[a]")
        progress.update(record(3))
    out = capsys.readouterr().out
    assert "step 2  saved runs/[a]" in out
    assert "3/4" in out
    assert "steps/token 1.50" in out


def test_the_log_has_every_line_with_the_time_over_all_starts(tmp_path, capsys):
    for first in (0, 20):
        with RunProgress(total_steps=40, first_step=first, interval=10, shown=True, log=RunLog(tmp_path)) as progress:
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
    with RunProgress(total_steps=2, first_step=0, interval=1, shown=True, log=RunLog(tmp_path)) as progress:
        progress.say("starting")
        progress.update(record(1))
    text = (tmp_path / RUN_LOG).read_text()
    assert "starting" in text
    assert "step 1/2  loss 6.0000" in text


def test_the_log_says_why_a_run_stopped(tmp_path):
    with pytest.raises(UserError), RunProgress(3, 0, 1, shown=True, log=RunLog(tmp_path)):
        raise UserError("no space left; free some")
    assert (tmp_path / RUN_LOG).read_text().rstrip().endswith("stopped: UserError: no space left; free some")


def test_a_full_disk_costs_lines_of_the_log_and_not_the_run(tmp_path):
    log = RunLog(tmp_path)
    log._file._file = open("/dev/full", "ab", buffering=0)  # noqa: SIM115
    log.write("lost")
    log.close()


class FullDisk:
    """A file that takes so many bytes and no more."""

    def __init__(self, file, space: int) -> None:
        self._file, self.space = file, space

    def __getattr__(self, name):
        return getattr(self._file, name)

    def write(self, content: bytes) -> int:
        if content and self.space == 0:
            raise OSError(28, "No space left on device")
        written = self._file.write(content[: self.space])
        self.space -= written
        return written


def test_records_wait_for_space_on_a_full_disk(tmp_path, caplog):
    log = MetricsLog(tmp_path, PLAIN, 0)
    log.write(record(1))
    log._file._file = FullDisk(log._file._file, space=30)
    for step in (2, 3):
        log.write(record(step))
        assert steps_of(tmp_path) == [1]
        assert (tmp_path / METRICS).read_text().endswith("}\n"), "half a record"
    log._file._file.space = 10**6
    log.write(record(4))
    assert steps_of(tmp_path) == [1, 2, 3, 4]
    log.close()
    (warning,) = caplog.messages
    assert "cannot be written, and is kept in memory: No space left on device" in warning


def test_what_is_not_finite_is_null(tmp_path):
    write(tmp_path, [1], grad_norm=float("inf"), cross_entropy=float("nan"), own_losses=[1.5, float("nan")])
    assert read_metrics(tmp_path) == [record(1, grad_norm=None, cross_entropy=None, own_losses=[1.5, None])]


def test_the_record_before_a_start_can_be_completed(tmp_path):
    write(tmp_path, [1, 2])
    log = MetricsLog(tmp_path, PLAIN, 2)
    log.complete(2, {"validation_loss": 3.0})
    log.write(record(3))
    log.close()
    assert read_metrics(tmp_path) == [record(1), record(2, validation_loss=3.0), record(3)]


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
    with RunProgress(4, 0, interval=1, shown=True, log=RunLog(tmp_path)) as progress:
        progress.say("starting")
        for step in (1, 2):
            progress.update(record(step))
    lines = [line.split("  ", 1)[1] for line in (tmp_path / RUN_LOG).read_text().splitlines()]
    assert lines[0] == "starting"
    assert lines[1].startswith("standard output cannot be written, training goes on: ")
    assert [line[:8] for line in lines[2:]] == ["step 1/4", "step 2/4"]
