"""Arrays that are built once and memory-mapped by every process: of a node, or of all nodes that share the folder.

A file is named by what its arrays are, written aside under a name of its own, and renamed, so that it never matters
who writes it or how often. A claim beside it only saves work: the process that made it builds, the others wait. A claim
whose process is gone counts for nothing.
"""

import hashlib
import json
import mmap
import os
import socket
import struct
import threading
import time
import uuid
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from megatron_ponder.base.errors import UserError
from megatron_ponder.base.files import create
from megatron_ponder.data.stamps import Stamps

MAGIC = b"PONDIDX1"
HEADER = struct.Struct("<8sI")  # magic, CRC-32 of all that follows
LENGTH = struct.Struct("<I")  # bytes of the description, which comes next
ALIGNMENT = 64
SECONDS_BETWEEN_SIGNS = 1.0
SECONDS_BETWEEN_LOOKS = 0.05


class IndexCache:
    """A folder of arrays, by description. It may be deleted at any time; what is missing or damaged is built again.

    Args:
        folder: made if needed; of one node, or shared by several.
        patience: seconds without a sign of life after which a builder on another node is taken for dead.

    Attributes:
        stamps: spares reading all of a file at each start, to see that it is sound.

    Raises:
        UserError: the folder cannot be made or written.
    """

    def __init__(self, folder: str | Path, patience: float = 60.0):
        self.folder = Path(folder)
        self.patience = patience
        self.stamps = Stamps(self.folder / "stamps")
        with self._explained():
            self.folder.mkdir(parents=True, exist_ok=True)

    def load(self, description: str, build: Callable[[], Sequence[np.ndarray]]) -> list[np.ndarray]:
        """The arrays of a description, read-only and memory-mapped.

        Args:
            description: everything that the arrays depend on.
            build: makes them; called if no other process has them or is at it.

        Raises:
            UserError: they cannot be written.
        """
        path = self.path(description)
        while (arrays := self._read(path, description)) is None:
            with self._explained(), self._claim(path) as ours:
                if ours:
                    # Another may have been ready just before.
                    if self._read(path, description) is None:
                        self._write(path, description, build())
                else:
                    self._wait(path)
        self._tidy(path)
        return arrays

    def path(self, description: str) -> Path:
        """The file that has, or will have, the arrays of a description."""
        return self.folder / f"{hashlib.sha256(description.encode()).hexdigest()[:40]}.index"

    def has(self, description: str) -> bool:
        """Whether a description's arrays are there and undamaged."""
        return self._read(self.path(description), description) is not None

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(
                f"cannot write the index cache {self.folder} ({error.strerror}): set data.cache_path to another "
                "folder, or leave it out"
            ) from None

    @contextmanager
    def _claim(self, path: Path) -> Iterator[bool]:
        """Whether the right to build was free, which is then held with signs of life until the block ends."""
        claim = _claim_path(path)
        if not create(claim, f"{socket.gethostname()} {os.getpid()}"):
            yield False
            return
        finished = threading.Event()
        signs = threading.Thread(target=_show_life, args=(claim, finished), daemon=True)
        signs.start()
        try:
            yield True
        finally:
            finished.set()
            signs.join()
            claim.unlink(missing_ok=True)

    def _wait(self, path: Path) -> None:
        """Until the claim is given back, or its process is gone, in which case the claim goes too.

        Whether a sign is new is seen by its change, as clocks of nodes differ.
        """
        claim = _claim_path(path)
        last, since = None, time.monotonic()
        while True:
            try:
                sign = claim.stat().st_mtime_ns
                holder = claim.read_text()
            except FileNotFoundError:
                return
            if sign != last:
                last, since = sign, time.monotonic()
            if _is_gone(holder) or time.monotonic() - since > self.patience:
                # If two see it and the second removes the claim of the first, both build the same file.
                claim.unlink(missing_ok=True)
                return
            time.sleep(SECONDS_BETWEEN_LOOKS)

    def _tidy(self, path: Path) -> None:
        """Remove the claim of a process that was killed between the last two steps, on which nobody waits any more."""
        claim = _claim_path(path)
        try:
            if _is_gone(claim.read_text()):
                claim.unlink(missing_ok=True)
        except OSError:
            pass  # there is none, or the folder is only for reading

    def _write(self, path: Path, description: str, arrays: Sequence[np.ndarray]) -> None:
        for left_over in self.folder.glob(f"{path.name}.*.partial"):
            left_over.unlink(missing_ok=True)
        partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}.partial")
        about = {"description": description, "arrays": [(array.dtype.str, array.shape) for array in arrays]}
        header = json.dumps(about).encode()
        begun = HEADER.size + LENGTH.size + len(header)
        parts = [LENGTH.pack(len(header)), header, bytes(-begun % ALIGNMENT)]
        for array in arrays:
            parts += [memoryview(np.ascontiguousarray(array)).cast("B"), bytes(-array.nbytes % ALIGNMENT)]
        checksum = 0
        for part in parts:
            checksum = zlib.crc32(part, checksum)
        try:
            # Not synced to the disk: if the machine fails, the checksum tells, and the file is built again.
            with open(partial, "xb") as file:
                file.write(HEADER.pack(MAGIC, checksum))
                for part in parts:
                    file.write(part)
            os.replace(partial, path)
        except FileNotFoundError:
            return  # removed as a left-over by a process that took this one for dead, and builds the same
        finally:
            partial.unlink(missing_ok=True)
        if self._read(path, description) is None:
            raise UserError(f"{path} cannot be read back as it was written: set data.cache_path to a sound disk")

    def _read(self, path: Path, description: str) -> list[np.ndarray] | None:
        """The arrays in a file, or None if it is absent, damaged, or about something else."""
        try:
            with open(path, "rb") as file:
                content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
                if self.stamps.once("index", [file], lambda: "sound" if _is_sound(content) else None) is None:
                    return None
        except (FileNotFoundError, ValueError):  # a file without content cannot be mapped
            return None
        (length,) = LENGTH.unpack_from(content, HEADER.size)
        begun = HEADER.size + LENGTH.size
        about = json.loads(content[begun : begun + length])
        if about["description"] != description:
            return None
        arrays = []
        at = begun + length
        for name, shape in about["arrays"]:
            at += -at % ALIGNMENT
            array = np.frombuffer(content, np.dtype(name), int(np.prod(shape)), at).reshape(shape)
            arrays.append(array)
            at += array.nbytes
        return arrays


def _is_sound(content: mmap.mmap) -> bool:
    if len(content) < HEADER.size:
        return False
    magic, checksum = HEADER.unpack_from(content)
    return magic == MAGIC and zlib.crc32(memoryview(content)[HEADER.size :]) == checksum


def _claim_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.claim")


def _show_life(claim: Path, finished: threading.Event) -> None:
    while not finished.wait(SECONDS_BETWEEN_SIGNS):
        try:
            os.utime(claim)
        except OSError:
            return  # taken away by a process that waited too long; it builds the same


def _is_gone(holder: str) -> bool:
    """Whether a claim's process was on this machine and is no more. One that cannot be told is not gone."""
    host, _, number = holder.partition(" ")
    if host != socket.gethostname() or not number.isdigit():
        return False
    try:
        os.kill(int(number), 0)
    except ProcessLookupError:
        return True
    except PermissionError:  # another user's
        pass
    return False
