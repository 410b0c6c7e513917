"""What was found out by reading all of a file, remembered for as long as nobody writes to it."""

import contextlib
import hashlib
import json
import os
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO

# File systems tell times of change apart from a few milliseconds to two seconds on. What changed a moment ago might
# change again and look the same.
SECONDS_UNTIL_SETTLED = 2.0
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class Stamps:
    """A folder with small files, each of which says what was found in other files and which state they were in.

    The state is device, inode, size and the times of change of content and of inode, the last of which no program can
    set: a file that was written to, replaced, or copied over in whatever way has another. A stamp also names the boot
    of the machine, because content that was not on the disk yet is lost when the machine stops, without any sign. So
    every machine looks for itself, once after each start; what decays on the disk meanwhile is not noticed.

    Args:
        folder: made when there is something to write; it may be deleted at any time. If it cannot be written, or the
            system does not tell one boot from another, nothing is remembered.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def once(self, what: str, files: Sequence[BinaryIO], find: Callable[[], str | None]) -> str | None:
        """What `find` returns about open files, or returned when they were in the same state.

        Args:
            what: names the question.
            files: open, so that what is read and what is asked for its state are the same.
            find: None is not remembered.
        """
        status = [os.fstat(file.fileno()) for file in files]
        state = [
            [os.path.realpath(file.name), of.st_dev, of.st_ino, of.st_size, of.st_mtime_ns, of.st_ctime_ns]
            for file, of in zip(files, status, strict=True)
        ]
        try:
            boot = BOOT_ID.read_text()
        except OSError:
            return find()
        key = json.dumps([boot, what, [path for path, *_ in state]])
        path = self.folder / f"{hashlib.sha256(key.encode()).hexdigest()[:40]}.stamp"
        with contextlib.suppress(OSError, ValueError):
            known = json.loads(path.read_bytes())
            if isinstance(known, dict) and known.get("state") == state and isinstance(known.get("found"), str):
                return known["found"]
        found = find()
        settled = max(max(of.st_mtime, of.st_ctime) for of in status) < time.time() - SECONDS_UNTIL_SETTLED
        if found is not None and settled:
            self._write(path, json.dumps({"state": state, "found": found}))
        return found

    def _write(self, path: Path, content: str) -> None:
        partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}.partial")
        with contextlib.suppress(OSError):
            self.folder.mkdir(parents=True, exist_ok=True)
            try:
                partial.write_text(content)
                os.replace(partial, path)
            finally:
                partial.unlink(missing_ok=True)
