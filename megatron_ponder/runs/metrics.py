"""What a run writes about itself: one JSON object a step, TensorBoard events, lines on a terminal and in a file."""

import json
import logging
import math
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from megatron_ponder.base.errors import Preempted, UserError, describe
from megatron_ponder.base.files import write_atomically
from megatron_ponder.config import LoggingConfig
from megatron_ponder.runs.lasting_file import LastingFile
from megatron_ponder.runs.weights_and_biases import WandbRun

METRICS, RUN_LOG = "metrics.jsonl", "train.log"
Value = float | int | list | str | bool | None
logger = logging.getLogger(__name__)


def read_metrics(run_dir: Path) -> list[dict]:
    """All records of a run, in order; a last line cut off by a crash is left out. A number not finite is None."""
    records = []
    for line in (run_dir / METRICS).read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


class MetricsLog:
    """The record of a run on disk, written by rank 0 alone.

    What cannot be written, because the disk is full, is kept and written later; training goes on.

    Attributes:
        kept: the records of the run before, up to the step that it goes on from.
    """

    def __init__(self, run_dir: Path, config: LoggingConfig, first_step: int, settings: Mapping | None = None) -> None:
        """Open for appending; what an interrupted run wrote after its last checkpoint is dropped.

        Args:
            run_dir: the run's folder.
            config: what to write.
            first_step: steps done; later records are dropped.
            settings: the whole configuration, for Weights & Biases.

        Raises:
            UserError: Weights & Biases is wanted and cannot be logged to.
        """
        path = run_dir / METRICS
        records = read_metrics(run_dir) if path.exists() else []
        self.kept = [record for record in records if record["step"] <= first_step]
        self._last = self.kept[-1] if self.kept else {}
        write_atomically(path, "".join(_line(record) for record in self.kept))
        self._file = LastingFile(path)
        self._waiting: list[bytes] = []
        self._run_dir, self._board, self._wandb = run_dir, None, None
        if config.tensorboard:
            self._open_board(first_step)
        if config.wandb_project is not None:
            self._wandb = WandbRun(run_dir, config.wandb_project, settings or {})

    def write(self, record: Mapping[str, Value]) -> None:
        """Append one record; `step` says which step it belongs to."""
        self._last = record
        self._waiting.append(_line(record).encode())
        self._flush()
        self._publish(record)

    def complete(self, step: int, fields: Mapping[str, Value]) -> None:
        """Add fields to the record of a step, the last one before this start."""
        if self._last.get("step") == step:
            self._file.shorten(len(_line(self._last).encode()))
        self._last = {"step": step} | self._last | fields
        self._waiting.append(_line(self._last).encode())
        self._flush()
        self._publish({"step": step} | fields)

    def close(self) -> None:
        """Write what is left and close everything."""
        self._flush()
        self._file.close()
        if self._board is not None:
            with suppress(OSError):
                self._board.close()
        if self._wandb is not None:
            self._wandb.finish()

    def _flush(self) -> None:
        try:
            removed = self._file.append(b"".join(self._waiting))
        except (OSError, UserError) as error:
            if len(self._waiting) == 1:
                logger.warning("%s cannot be written, and is kept in memory: %s", self._file.path, describe(error))
            return
        self._waiting.clear()
        if removed and self._board is not None:
            self._open_board(self._last["step"] - 1)

    def _open_board(self, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._board = SummaryWriter(str(self._run_dir), purge_step=step + 1)

    def _publish(self, record: Mapping[str, Value]) -> None:
        numbers = {key: value for key, value in record.items() if isinstance(value, int | float) and key != "step"}
        if self._board is not None:
            try:
                for key, value in numbers.items():
                    self._board.add_scalar(key, value, record["step"])
            except OSError as error:
                logger.warning("no more TensorBoard events are written: %s", error)
                self._board = None
        if self._wandb is not None:
            self._wandb.log(numbers, step=record["step"])


def _line(record: Mapping[str, Value]) -> str:
    """One line of JSON, which has no number for what is not finite."""
    finite = {k: [_finite(x) for x in v] if isinstance(v, list) else _finite(v) for k, v in record.items()}
    return json.dumps(finite, allow_nan=False) + "\n"


def _finite(value: Value) -> Value:
    return None if isinstance(value, float) and not math.isfinite(value) else value


class RunLog:
    """`train.log`: what a run says, every line with the time, over all its starts. Written by rank 0 alone."""

    def __init__(self, run_dir: Path) -> None:
        """Open for appending.

        Raises:
            OSError: if it cannot be written.
        """
        self._file = LastingFile(run_dir / RUN_LOG)

    def write(self, message: str) -> None:
        """Append one line or more. A disk that is full meanwhile costs lines, and not the run."""
        now = time.strftime("%Y-%m-%d %H:%M:%S")
        with suppress(OSError, UserError):
            self._file.append("".join(f"{now}  {line}".rstrip() + "\n" for line in message.splitlines()).encode())

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class RunProgress:
    """A bar on a terminal, plain lines elsewhere and in the run's log; the same words on all.

    Standard output that cannot be written, because nobody reads it any more or its disk is full, costs its lines; the
    log says so once.

    Use as a context manager around the loop.
    """

    def __init__(
        self, total_steps: int, first_step: int, interval: int, shown: bool, log: RunLog | None = None
    ) -> None:
        """Show progress on this rank.

        Args:
            total_steps: of the run.
            first_step: steps done before.
            interval: steps between plain lines.
            shown: false on all ranks but one.
            log: the run's log file, closed at the end.
        """
        self._log = log
        self._total, self._interval, self._shown = total_steps, interval, shown
        self._bar, self._mute = None, False
        self._recent: deque[float] = deque([time.monotonic()], maxlen=50)
        if shown and sys.stdout.isatty():
            self._bar = Progress(
                TextColumn("[bold]training"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[words]}"),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                console=Console(),
            )
            self._task = self._bar.add_task("train", total=total_steps, completed=first_step, words="")

    def __enter__(self) -> "RunProgress":
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, kind, error, _) -> None:
        if self._bar is not None:
            self._try(self._bar.stop)
        if self._log is not None:
            if error is not None and kind is not Preempted:  # which has been said
                self._log.write(f"stopped: {kind.__name__}: {describe(error)}")
            self._log.close()

    def update(self, record: Mapping[str, float]) -> None:
        """Show a finished step."""
        if not self._shown:
            return
        self._recent.append(time.monotonic())
        words = (
            f"loss {nats(record['loss'])}  steps/token {record['mean_steps']:.2f}  "
            f"{record['tokens_per_second']:,.0f} tokens/s"
        )
        if self._bar is not None:
            self._bar.update(self._task, completed=record["step"], words=words)
        if record["step"] % self._interval == 0 or record["step"] == self._total:
            pace = (self._recent[-1] - self._recent[0]) / (len(self._recent) - 1)
            left = duration(pace * (self._total - record["step"]))
            line = f"step {record['step']}/{self._total}  {words}  left {left}"
            if self._bar is None:
                self._try(print, line, flush=True)
            if self._log is not None:
                self._log.write(line)

    def say(self, message: str) -> None:
        """Print a line above the bar."""
        if not self._shown:
            return
        if self._log is not None:
            self._log.write(message)
        if self._bar is not None:
            self._try(self._bar.console.print, message, highlight=False, markup=False)
        else:
            self._try(print, message, flush=True)

    def _try(self, show: Callable[..., None], *args, **kwargs) -> None:
        try:
            show(*args, **kwargs)
        except (OSError, ValueError) as error:  # a file that has been closed is a ValueError
            if self._log is not None and not self._mute:
                self._log.write(f"standard output cannot be written, training goes on: {describe(error)}")
            self._mute = True


def nats(loss: float) -> str:
    """A loss as it is shown."""
    return f"{loss:.4f}" if math.isfinite(loss) else "not finite"


def duration(seconds: float) -> str:
    """Hours, minutes and seconds: 1:02:03."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
