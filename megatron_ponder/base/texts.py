"""Text as users give it, in files, through pipes and in JSON: read in one way everywhere, and refused in one way."""

import codecs
import io
import json
import os
import stat
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

from megatron_ponder.base.errors import UserError

STANDARD_INPUT = "-"
UTF16_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def read_text(path: str | Path) -> str:
    """What a UTF-8 file says, its line ends as they are, without a byte order mark.

    Args:
        path: of a file; `-` is standard input.

    Raises:
        UserError: see `read_content` and `decode`.
    """
    return decode(read_content(path), name_of(path))


def read_content(path: str | Path) -> bytes:
    """The bytes of a file, or of standard input where the path is `-`.

    Raises:
        UserError: it is a folder, a pipe or a device; see `open_standard_input` too.
        OSError: it does not exist or cannot be read.
    """
    if str(path) == STANDARD_INPUT:
        return open_standard_input().read()
    require_file(path)
    return Path(path).read_bytes()


def name_of(path: str | Path) -> str:
    """What to call a file in messages."""
    return "standard input" if str(path) == STANDARD_INPUT else str(path)


def open_standard_input() -> BinaryIO:
    """Standard input, to read bytes from.

    Raises:
        UserError: it is closed, or a device, other than a terminal and /dev/null.
    """
    if sys.stdin is None or sys.stdin.closed:
        raise UserError("standard input is closed: give it a file or a pipe")
    with suppress(io.UnsupportedOperation):  # it is no file of the system
        status = os.fstat(sys.stdin.fileno())
        ends = sys.stdin.isatty() or status.st_rdev == os.stat(os.devnull).st_rdev
        if stat.S_ISCHR(status.st_mode) and not ends:
            raise UserError("standard input is a device: give it a file or a pipe")
    return sys.stdin.buffer


def require_file(path: str | Path) -> None:
    """Refuse what is there and is no file, which could be read for ever, or waited for.

    Raises:
        UserError: it is a folder, a pipe or a device.
        OSError: it does not exist or cannot be looked at.
    """
    mode = os.stat(path).st_mode
    if stat.S_ISDIR(mode):
        raise UserError(f"{path} is a folder: give a file")
    if not stat.S_ISREG(mode):
        raise UserError(f"{path} is a {_kind(mode)}: write what it gives to a file, and give that")


def decode(content: bytes, name: str) -> str:
    """UTF-8 text without a byte order mark at its beginning.

    Args:
        content: all of it.
        name: what to call it in messages.

    Raises:
        UserError: it is not UTF-8.
    """
    if content.startswith(UTF16_MARKS):
        raise UserError(f"{name} is UTF-16 text: convert it to UTF-8, as iconv -f UTF-16 -t UTF-8 does")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{name} is not UTF-8 text ({error.reason} at byte {error.start}): convert it to UTF-8"
        ) from None


def check_text(value: Any, name: str) -> None:
    """Refuse strings that cannot be written as UTF-8, which JSON allows: halves of surrogate pairs such as `\\ud800`.

    Args:
        value: a string, or anything that JSON has; strings are looked for in lists and objects too.
        name: what to call it in messages.

    Raises:
        UserError: it has such a string.
    """
    written = json.dumps(value, ensure_ascii=False)
    try:
        written.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(
            f"{name} has half a surrogate pair ({ascii(written[error.start])[1:-1]}), which is no character: "
            "leave it out"
        ) from None


def _kind(mode: int) -> str:
    return "pipe" if stat.S_ISFIFO(mode) else "socket" if stat.S_ISSOCK(mode) else "device"
