"""What a run says, in a file of its folder."""

import time
from contextlib import suppress
from pathlib import Path

from megatron_ponder.base.errors import UserError
from megatron_ponder.runs.lasting_file import LastingFile

RUN_LOG = "train.log"


class RunLog:
    """What a run says, in `train.log`: every line with the time, over all its starts. Written by rank 0 alone."""

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
