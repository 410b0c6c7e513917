"""Progress of a run: a bar on a terminal, and plain lines elsewhere."""

import math
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from megatron_ponder.base.durations import format_duration
from megatron_ponder.base.errors import Preempted, describe
from megatron_ponder.runs.run_log import RunLog


class RunProgress:
    """A bar on a terminal, plain lines elsewhere and in the run's log; the same words on all.

    Standard output that cannot be written, because nobody reads it any more or its disk is full, costs its lines; the
    log says so once.

    Use as a context manager around the loop.
    """

    def __init__(self, total_steps: int, first_step: int, interval: int, log: RunLog | None = None) -> None:
        """Prepare.

        Args:
            total_steps: of the run.
            first_step: steps done before.
            interval: steps between plain lines.
            log: the run's log file, closed at the end.
        """
        self._log = log
        self._total, self._interval = total_steps, interval
        self._bar, self._mute = None, False
        self._recent: deque[float] = deque([time.monotonic()], maxlen=50)
        if sys.stdout.isatty():
            self._bar = Progress(
                TextColumn("[bold]training"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[words]}"),
                TimeElapsedColumn(),
                TextColumn("left {task.fields[left]}"),
                console=Console(),
            )
            self._task = self._bar.add_task("train", total=total_steps, completed=first_step, words="", left="?")

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
        self._recent.append(time.monotonic())
        words = (
            f"loss {nats(record['loss'])}  latent steps/token {record['mean_latent_steps']:.2f}  "
            f"{record['tokens_per_second']:,.0f} tokens/s"
        )
        pace = (self._recent[-1] - self._recent[0]) / (len(self._recent) - 1)
        left = format_duration(pace * record["steps_left"])
        if self._bar is not None:
            self._bar.update(self._task, completed=record["step"], words=words, left=left)
        if record["step"] % self._interval == 0 or record["step"] == self._total:
            line = f"step {record['step']}/{self._total}  {words}  left {left}"
            if self._bar is None:
                self._try(print, line, flush=True)
            if self._log is not None:
                self._log.write(line)

    def say(self, message: str) -> None:
        """Print a line above the bar."""
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
