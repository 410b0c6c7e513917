"""The log of what a run says, in its folder."""

import time
from contextlib import suppress
from pathlib import Path

from megatron_ponder.base.errors import UserError
from megatron_ponder.runs.lasting_file import LastingFile

RUN_LOG = "train.log"


class RunLog:
    """Writes `train.log`: every line that a run says, with the time, over all its starts. On rank 0 alone."""

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
