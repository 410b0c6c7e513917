"""What generation has cost, in figures for people, and how far a long job has come."""

import sys
import time
from dataclasses import dataclass, fields

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from megatron_ponder.base.counts import counted
from megatron_ponder.generation.generator import Generator
from megatron_ponder.generation.request import Generation

SECONDS_BETWEEN_LINES = 60.0


@dataclass
class Totals:
    """Counts over sequences and forwards.

    Attributes:
        sequences: that ended.
        failed: of these.
        tokens: generated.
        fed: tokens that the model was fed.
        executed: latent steps of these.
        slots: that were run, iterates of prompts included.
        rows: sequences that took part, summed over forwards.
        places: for sequences, summed over forwards.
    """

    sequences: int = 0
    failed: int = 0
    tokens: int = 0
    fed: int = 0
    executed: int = 0
    slots: int = 0
    rows: int = 0
    places: int = 0

    def add(self, generation: Generation) -> None:
        """Count a sequence that has ended."""
        self.sequences += 1
        self.failed += generation.finish_reason == "failed"
        self.tokens += len(generation.tokens)
        self.fed += len(generation.executed_steps)
        self.executed += sum(generation.executed_steps)

    def observe(self, generator: Generator) -> None:
        """Take over what the generator has run since its beginning."""
        usage = generator.usage
        self.slots, self.rows, self.places = usage.slots, usage.rows, usage.forwards * generator.sequences_per_forward

    def __add__(self, other: "Totals") -> "Totals":
        return Totals(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(self)))

    def __sub__(self, other: "Totals") -> "Totals":
        return Totals(*(getattr(self, field.name) - getattr(other, field.name) for field in fields(self)))

    def closing_line(self, seconds: float) -> str:
        """What it was, and how fast.

        Args:
            seconds: that it took.
        """
        seconds = max(seconds, 1e-9)
        return (
            f"{self.tokens:,} tokens in {seconds:.2f} s: {self.tokens / seconds:,.1f} tokens/s, "
            f"{self.slots / seconds:,.1f} slots/s, {self.executed / max(1, self.fed):.2f} latent steps per token, "
            f"{100 * self.rows / max(1, self.places):.0f} % of rows in use"
        )


class TaskProgress:
    """Context manager that shows how many sequences of a job have ended: a bar, or now and then a line in a log."""

    def __init__(self, total: int, done: int, silent: bool) -> None:
        """Begin.

        Args:
            total: sequences of the job.
            done: of these, before now.
            silent: show nothing.
        """
        console = Console(stderr=True)
        self._total, self._before, self._silent, self._terminal = total, done, silent, console.is_terminal
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            disable=silent or not console.is_terminal,
            transient=True,
        )
        self._task = self._bar.add_task("", total=total, completed=done)

    def __enter__(self) -> "TaskProgress":
        self._begun = self._line_at = time.monotonic()
        self._bar.start()
        return self

    def __exit__(self, *exception) -> None:
        self._bar.stop()

    def update(self, totals: Totals) -> None:
        """Show the counts since the beginning."""
        now, done = time.monotonic(), self._before + totals.sequences
        speed = f"{totals.tokens / max(now - self._begun, 1e-9):,.1f} tokens/s"
        self._bar.update(self._task, completed=done, description=speed)
        if not (self._silent or self._terminal) and now - self._line_at > SECONDS_BETWEEN_LINES:
            self._line_at = now
            print(f"{done:,} of {counted(self._total, 'sequence')}  {speed}", file=sys.stderr, flush=True)
