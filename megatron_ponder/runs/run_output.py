"""All that a run tells of itself while it trains: numbers, words, and how its start ended."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict

from megatron_ponder.base.errors import describe
from megatron_ponder.config import Config
from megatron_ponder.runs.metrics import MetricsLog, Value, of_steps
from megatron_ponder.runs.plots import plot_training
from megatron_ponder.runs.progress_bar import RunProgress
from megatron_ponder.runs.run_folder import RunFolder
from megatron_ponder.runs.run_log import RunLog
from megatron_ponder.runs.starts import recorded


class Silence:
    """The output of all ranks but the first: nothing. Use as a context manager around training.

    Attributes:
        losses: of the steps before this start.
    """

    losses: Sequence[float | None] = ()

    def __enter__(self) -> "Silence":
        return self

    def __exit__(self, *_) -> None:
        pass

    def say(self, message: str) -> None:
        """Tell whoever watches, and the log."""

    def note(self, message: str) -> None:
        """Tell the log alone."""

    def record(self, record: Mapping[str, Value]) -> None:
        """Write the numbers of a step, and show it."""

    def complete(self, step: int, fields: Mapping[str, Value]) -> None:
        """Add numbers to those of a step, the last one before this start."""

    def check_folder(self) -> None:
        """Refuse to write where another run writes by now; see `RunFolder.check`."""

    def draw(self) -> None:
        """Draw what has become of the run."""


class RunOutput(Silence):
    """The output of the first rank, in the run's folder and on standard output."""

    def __init__(self, folder: RunFolder, config: Config, first_step: int, ranks: int) -> None:
        """Open the files; those of an earlier start are gone on with.

        Args:
            folder: that this run has taken.
            config: resolved.
            first_step: optimiser steps done before.
            ranks: of the job.

        Raises:
            UserError: a service that is wanted cannot be logged to.
            OSError: the folder cannot be written.
        """
        self._folder = folder
        self._metrics = MetricsLog(folder.path, config.logging, first_step, asdict(config))
        self._log = RunLog(folder.path)
        self._progress = RunProgress(config.training.steps, first_step, config.logging.interval, self._log)
        self._start = recorded(folder, first_step, ranks)
        self._closing = ExitStack()
        self.losses = [record["loss"] for record in of_steps(self._metrics.kept)]

    def __enter__(self) -> "RunOutput":
        with self._closing as closing:
            closing.callback(self._metrics.close)
            closing.enter_context(self._start)
            closing.enter_context(self._progress)
            self._closing = closing.pop_all()
        return self

    def __exit__(self, *error) -> None:
        self._closing.__exit__(*error)

    def say(self, message: str) -> None:
        self._progress.say(message)

    def note(self, message: str) -> None:
        self._log.write(message)

    def record(self, record: Mapping[str, Value]) -> None:
        self._metrics.write(record)
        self._progress.update(record)

    def complete(self, step: int, fields: Mapping[str, Value]) -> None:
        self._metrics.complete(step, fields)

    def check_folder(self) -> None:
        self._folder.check()

    def draw(self) -> None:
        try:
            self.say(f"loss plot in {plot_training(self._folder.path)}")
        except OSError as error:  # a picture is not worth an error
            self.say(f"warning: no loss plot: {describe(error)}")
