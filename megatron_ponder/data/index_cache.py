"""Arrays that are built once and memory-mapped by every process: of a node, or of all nodes that share the folder.

A file is named by what its arrays are, written aside under a name of its own, and renamed, so that it never matters
who writes it or how often. A lock beside it only saves work: whoever has it builds, the others wait. The system takes
it from a process that is gone.
"""

import hashlib
import json
import mmap
import os
import struct
import uuid
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
from filelock import FileLock, Timeout

from megatron_ponder.base.errors import UserError
from megatron_ponder.data.stamps import Stamps

MAGIC = b"PONDIDX1"
HEADER = struct.Struct("<8sI")  # magic, CRC-32 of all that follows
LENGTH = struct.Struct("<I")  # bytes of the description, which comes next
ALIGNMENT = 64


class IndexCache:
    """A folder of arrays, by description. It may be deleted at any time; what is missing or damaged is built again.

    Args:
        folder: made if needed; of one node, or shared by several.
        patience: seconds to wait for another process before building the same.

    Attributes:
        stamps: spares reading all of a file at each start, to see that it is sound.

    Raises:
        UserError: the folder cannot be made or written.
    """

    def __init__(self, folder: str | Path, patience: float = 600.0) -> None:
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
            with self._explained(), self._turn(path):
                if self._read(path, description) is None:  # else another process has built it meanwhile
                    self._write(path, description, build())
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
                f"cannot write the index cache {self.folder} ({error.strerror}); set data.cache_path to another "
                "folder, or leave it out"
            ) from None

    @contextmanager
    def _turn(self, path: Path) -> Iterator[None]:
        """Wait for whoever builds the same, and keep others waiting; without an end of patience, build all the same."""
        lock = FileLock(f"{path}.lock")
        with suppress(Timeout):
            lock.acquire(timeout=self.patience)
        try:
            yield
        finally:
            lock.release()

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
            raise UserError(f"{path} cannot be read back as it was written; set data.cache_path to a sound disk")

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
