"""The starts of a run: from where each was made, and how it ended."""

import json
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from megatron_ponder.base.errors import Preempted
from megatron_ponder.base.files import write_atomically
from megatron_ponder.runs.json_lines import records_in
from megatron_ponder.runs.run_folder import RunFolder

STARTS, END = "starts.jsonl", "end.json"


class Durations:
    """Durations of the parts of a start, as text: `6.1 s imports, 0.3 s data`."""

    def __init__(self, begun: float) -> None:
        """Begin at a time of the monotonic clock."""
        self._begun = self._last = begun
        self._parts: list[str] = []

    def mark(self, name: str) -> None:
        """A part has ended."""
        now = time.monotonic()
        self._parts.append(f"{now - self._last:.1f} s {name}")
        self._last = now

    def __str__(self) -> str:
        return f"{self._last - self._begun:.1f} s: {', '.join(self._parts)}"


def read_starts(run_dir: Path) -> list[dict]:
    """All starts of a run, in order; a line cut off by a crash is left out."""
    path = run_dir / STARTS
    return records_in(path.read_bytes()) if path.is_file() else []


def read_end(run_dir: Path) -> dict | None:
    """Read how the last start ended, with `time` and `reason`; None while it runs, and after it was killed."""
    try:
        end = json.loads((run_dir / END).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    return end if isinstance(end, dict) and "reason" in end else None


@contextmanager
def recorded(folder: RunFolder, step: int, ranks: int) -> Iterator[None]:
    """Append a start to the run's record, and note how the block ends; on one rank alone.

    Args:
        folder: of the run.
        step: steps done before.
        ranks: of the job.
    """
    run_dir = folder.path
    last = read_end(run_dir)
    previous = last["reason"] if last else ("killed" if read_starts(run_dir) else None)
    start = {"time": time.time(), "step": step, "host": socket.gethostname(), "ranks": ranks, "previous": previous}
    path = run_dir / STARTS
    cut_off = path.exists() and path.stat().st_size > 0 and not path.read_bytes().endswith(b"\n")
    with path.open("a", encoding="utf-8") as file:
        file.write("\n" * cut_off + json.dumps(start) + "\n")
    (run_dir / END).unlink(missing_ok=True)
    try:
        yield
    except BaseException as error:
        if folder.is_ours():
            _note_end(run_dir, error.reason if isinstance(error, Preempted) else f"{type(error).__name__}: {error}")
        raise
    _note_end(run_dir, "finished")


def _note_end(run_dir: Path, reason: str) -> None:
    with suppress(OSError):  # the disk may be what has ended the run, and the reason for that must come through
        write_atomically(run_dir / END, json.dumps({"time": time.time(), "reason": reason}))
