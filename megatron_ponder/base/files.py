"""Files that are either whole or absent: written aside, made durable, and renamed into place."""

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from megatron_ponder.base.errors import UserError

SUGGESTED = 3  # folders that an error names at most


def partial_path(path: Path) -> Path:
    """Where the content of `path` is written until it is complete."""
    return path.with_name(f"{path.name}.partial")


def make_folder(folder: Path) -> None:
    """Make the folder that output goes to, and those above it, where they do not exist.

    Raises:
        UserError: it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"cannot make the folder {folder} ({error.strerror}): choose another folder to write to"
        ) from None


def check_writable(folder: Path) -> None:
    """Make the folder that the output of long work goes to, and find out before it whether one can write there.

    Raises:
        UserError: the folder cannot be made.
        OSError: no file can be made in it.
    """
    make_folder(folder)
    probe = folder / f".{os.getpid()}.partial"
    probe.touch()
    probe.unlink()


def check_output(path: Path) -> None:
    """Find out before long work whether its result can be written to a file, whose folder is made.

    Raises:
        UserError: it is a folder, or its folder cannot be made.
        OSError: it cannot be written.
    """
    if path.is_dir():
        raise UserError(f"{path} is a folder; give the name of a file to write")
    if not _is_no_file(path):
        check_writable(path.parent)


def did_you_mean(folder: Path, wanted: Callable[[Path], bool]) -> str:
    """The end of an error about a folder that is not what a command needs, where folders one level below are.

    Args:
        folder: that was named.
        wanted: whether a folder is what the command needs.

    Returns:
        Such as `; did you mean runs/a?`; nothing where no folder below is wanted.
    """
    below = sorted(path for path in folder.iterdir() if path.is_dir() and wanted(path)) if folder.is_dir() else []
    if not below:
        return ""
    named = ", ".join(map(str, below[:SUGGESTED]))
    more = f" or one of {len(below) - SUGGESTED} others" if len(below) > SUGGESTED else ""
    return f"; did you mean {named}{more}?"


def publish(path: Path) -> None:
    """Rename the finished, already synced partial file of `path` into place, replacing what was there."""
    os.replace(partial_path(path), path)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give the block a path to write to; when it ends without an exception, what it wrote replaces `path`.

    For what a library writes by itself (a figure, a CSV file); `write_atomically` is for content that is at hand. A
    crash at any moment, or a full disk, leaves either the old file or the new one.

    Args:
        path: of the file, in an existing folder. What the block is given has the same ending. A link goes on
            pointing where it does; a device or a pipe is written to straight.
    """
    if _is_no_file(path):
        yield path
        return
    path = _behind_links(path)
    aside = path.with_name(f".{path.stem}.partial{path.suffix}")
    try:
        yield aside
        with open(aside, "rb+") as file:
            sync(file)
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
    sync_folder(path.parent)


def write_atomically(path: Path, content: bytes | str) -> None:
    """Write `content`, text as UTF-8, to `path`; a crash at any moment leaves either the old file or the new one.

    A link goes on pointing where it does; a device or a pipe is written to straight.
    """
    content = content.encode() if isinstance(content, str) else content
    if _is_no_file(path):
        path.write_bytes(content)
        return
    path = _behind_links(path)
    try:
        with open(partial_path(path), "wb") as file:
            file.write(content)
            sync(file)
        publish(path)
    finally:
        partial_path(path).unlink(missing_ok=True)
    sync_folder(path.parent)


def checksum(content: dict) -> str:
    """SHA-256 of what a JSON file says, however it is laid out; of all but the checksum itself."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _is_no_file(path: Path) -> bool:
    """Whether a path is a device, a pipe, or an open file as `/dev/stdout` is, none of which can be replaced."""
    link = os.readlink(path) if path.is_symlink() else ""
    if link.startswith("/proc/") or os.path.realpath(path.parent).startswith("/proc/"):
        return True
    return path.exists() and not path.is_file() and not path.is_dir()


def _behind_links(path: Path) -> Path:
    """The file that a path leads to; a link that leads to none is what is replaced itself."""
    return path.resolve() if path.is_file() else path


def sync(file: BinaryIO) -> None:
    """Flush an open binary file through to the disk."""
    file.flush()
    os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Make renames inside `folder` durable, on systems where a folder can be opened."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
