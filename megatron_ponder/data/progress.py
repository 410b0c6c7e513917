"""How far a long run over text has come: a line on the terminal, or now and then a line in a log."""

import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from megatron_ponder.base.durations import format_duration
from megatron_ponder.data.shards import Shard
from megatron_ponder.data.text_files import ReadingCounts, TextPart

SECONDS_BETWEEN_LINES = 60.0
SECONDS_BETWEEN_LOOKS = 5.0


class ThroughputDisplay:
    """Context manager that shows documents/s, MB/s and tokens/s of this rank, and the time that all ranks still need.

    Args:
        shards: what there is to do; which of them are finished, whoever did it, is looked up now and then.
        silent: show nothing.
    """

    def __init__(self, shards: Sequence[Shard], silent: bool) -> None:
        self._sizes = {shard.folder.name: shard.input_bytes for shard in shards}
        self._work = shards[0].folder.parent if shards else None
        self._total = sum(self._sizes.values())
        console = Console(stderr=True)
        self._silent = silent
        self._terminal = console.is_terminal
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            console=console,
            disable=silent or not console.is_terminal,
            transient=True,
        )
        self._task = self._progress.add_task("", total=None)

    def __enter__(self) -> "ThroughputDisplay":
        self._begun = self._line_at = time.monotonic()
        if not self._silent:
            self._look()
            self._at_first = self._finished_bytes
        self._progress.start()
        return self

    def __exit__(self, exception_type, exception, traceback) -> None:
        self._progress.stop()

    def update(self, documents: int, text_bytes: int, tokens: int, shard: Shard, input_bytes: int) -> None:
        """Take note of the counts of this rank since the beginning, and of how much of a shard has been read."""
        if self._silent:
            return
        now = time.monotonic()
        if now - self._looked_at > SECONDS_BETWEEN_LOOKS:
            self._look()
        under_way = 0 if shard.folder.name in self._finished else min(input_bytes, self._sizes[shard.folder.name])
        line = self.describe(now - self._begun, documents, text_bytes, tokens, self._finished_bytes + under_way)
        if self._terminal:
            self._progress.update(self._task, description=line)
        elif now - self._line_at > SECONDS_BETWEEN_LINES:
            self._line_at = now
            print(line, file=sys.stderr, flush=True)

    def describe(self, seconds: float, documents: int, text_bytes: int, tokens: int, input_bytes: int) -> str:
        """The line for counts since the beginning and the bytes of input that are done in all."""
        done = input_bytes - self._at_first
        left = f"{format_duration((self._total - input_bytes) * seconds / done)} left" if done > 0 else "? left"
        seconds = max(seconds, 1e-9)
        return (
            f"{100 * input_bytes / max(1, self._total):.1f} %  {documents:,} documents  {documents / seconds:,.0f} "
            f"documents/s  {text_bytes / seconds / 1e6:.1f} MB/s  {tokens / seconds:,.0f} tokens/s  {left}"
        )

    def _look(self) -> None:
        self._looked_at = time.monotonic()
        self._finished = {name for name in os.listdir(self._work) if name in self._sizes} if self._work else set()
        self._finished_bytes = sum(self._sizes[name] for name in self._finished)


class StageDisplay:
    """Context manager that shows one stage of a work after another, the first of which reads a corpus.

    Args:
        total: bytes of the corpus as it lies there.
    """

    def __init__(self, total: int) -> None:
        self._total = total
        console = Console(stderr=True)
        self._terminal = console.is_terminal
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            TimeElapsedColumn(),
            console=console,
            disable=not console.is_terminal,
            transient=True,
        )
        self._task = self._progress.add_task("", total=None)

    def __enter__(self) -> "StageDisplay":
        self._begun = self._line_at = time.monotonic()
        self._progress.start()
        return self

    def __exit__(self, exception_type, exception, traceback) -> None:
        self._progress.stop()

    def following(self, segments: Iterable[TextPart], tally: ReadingCounts) -> Iterator[TextPart]:
        """What is read of the corpus, shown as it comes."""
        for segment in segments:
            line = f"reading  {100 * tally.input_bytes / max(1, self._total):.1f} % of {self._total / 1e6:,.1f} MB"
            if self._terminal:
                self._progress.update(self._task, description=line)
            elif time.monotonic() - self._line_at > SECONDS_BETWEEN_LINES:
                self._line_at = time.monotonic()
                print(line, file=sys.stderr, flush=True)
            yield segment

    def stage(self, what: str) -> None:
        """Show what is done next, which may take long and does not say how far it is."""
        if self._terminal:
            self._progress.update(self._task, description=what)
        elif time.monotonic() - self._begun > SECONDS_BETWEEN_LINES:
            print(what, file=sys.stderr, flush=True)


def warn(line: str) -> None:
    """Say on stderr, before the work, what somebody may want to stop it for."""
    print(f"warning: {line}", file=sys.stderr, flush=True)
