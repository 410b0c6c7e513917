"""A file that a run appends to for as long as it lives, whatever becomes of the disk and of the folder."""

import errno
import logging
import os
from contextlib import suppress
from pathlib import Path

from megatron_ponder.base.files import make_folder

logger = logging.getLogger(__name__)


class LastingFile:
    """Appends whole pieces or nothing of them, and makes the file again, with all it held, if somebody removes it.

    Attributes:
        path: of the file.
    """

    def __init__(self, path: Path) -> None:
        """Open for appending.

        Raises:
            OSError: it cannot be written.
        """
        self.path = path
        self._open()

    def append(self, content: bytes) -> bool:
        """Append a piece.

        Returns:
            Whether the file had been removed, and has been made again.

        Raises:
            OSError: it cannot be written now; nothing has been appended.
        """
        removed = self._is_removed()
        if removed:
            self._make_again()
        try:
            written = self._file.write(content)
            if written < len(content):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
        except OSError:
            with suppress(OSError):
                self._file.truncate(self._end)  # no part of a piece may stay
            raise
        self._end += written
        return removed

    def shorten(self, size: int) -> None:
        """Take the last so many bytes away."""
        self._end -= size
        self._file.truncate(self._end)

    def close(self) -> None:
        """Close the file."""
        with suppress(OSError):
            self._file.close()

    def _open(self) -> None:
        self._file = self.path.open("a+b", buffering=0)
        self._end = os.fstat(self._file.fileno()).st_size

    def _is_removed(self) -> bool:
        """Tell whether the name stands for another file by now, or for none."""
        try:
            return not os.path.samestat(self.path.stat(), os.fstat(self._file.fileno()))
        except OSError:  # none, or one that another machine has removed
            return True

    def _make_again(self) -> None:
        """Write again what was removed; it can be read while it is open, but not over every network file system."""
        held = b""
        with suppress(OSError):
            held = os.pread(self._file.fileno(), self._end, 0)
        make_folder(self.path.parent)
        replaced = self.path.exists()
        self.close()
        self._open()
        if not replaced:
            self._end += self._file.write(held)
        logger.warning("%s was removed or replaced while training goes on; it is written again", self.path)
