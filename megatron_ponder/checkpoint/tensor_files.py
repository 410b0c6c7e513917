"""Files that are durable once they are written, and checksums that tell whether they still are what was written."""

import hashlib
import json
import math
import os
import struct
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_ponder.base.counts import first_of
from megatron_ponder.base.errors import UserError

# Bytes that are read or written at once: few enough to be still in the cache when their checksum is taken.
CHUNK = 1 << 20


def write_tensors(
    folder: Path, name: str, tensors: Mapping[str, Tensor], shapes: Mapping[str, Sequence[int]] | None = None
) -> tuple[int, str]:
    """Write one safetensors file durably.

    The checksum is of what is given, and taken while it is written. With the library's writer the file would have to be
    read again for it, which takes about as long as to write it, and hides what went wrong on the way to the disk.

    Args:
        folder: an existing folder.
        name: of the file.
        tensors: fp32, on the CPU, by `kind/parameter name`.
        shapes: of all of them, where each is made when it is taken, which then happens once; theirs unless given.

    Returns:
        Its size in bytes and sha256, for the manifest.

    Raises:
        UserError: if the file cannot be written.
    """
    path, digest = folder / name, hashlib.sha256()
    try:
        with path.open("wb") as file:
            for piece in _safetensors(tensors, shapes or {key: tensor.shape for key, tensor in tensors.items()}):
                file.write(piece)
                digest.update(piece)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        reason = error.strerror
        raise UserError(f"could not write {path}: {reason}; free some space or choose another folder") from error
    return path.stat().st_size, digest.hexdigest()


def _safetensors(tensors: Mapping[str, Tensor], shapes: Mapping[str, Sequence[int]]) -> Iterator[bytes | np.ndarray]:
    """A safetensors file piece by piece: length of the header, header, and the tensors one behind the other."""
    header, end = {}, 0
    for key, shape in shapes.items():
        start, end = end, end + 4 * math.prod(shape)
        header[key] = {"dtype": "F32", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8
    yield struct.pack("<Q", len(text)) + text
    for key, shape in shapes.items():
        tensor = tensors[key]
        assert tensor.dtype == torch.float32 and tensor.shape == tuple(shape), f"{key} is {tensor.dtype}"
        content = tensor.detach().contiguous().view(-1).view(torch.uint8).numpy()
        yield from (content[start : start + CHUNK] for start in range(0, content.size, CHUNK))


def problem_of(path: Path, size: int, digest: str | None, advance: Callable[[int], None] | None = None) -> str | None:
    """Describe what is wrong with a file, as the end of a sentence that begins with its name; None if it is whole.

    Args:
        path: of the file.
        size: in bytes, when it was written.
        digest: its sha256 then; None compares the size alone.
        advance: told the number of further bytes that have been read.
    """
    if not path.is_file():
        return "is missing"
    if path.stat().st_size != size:
        return f"has {path.stat().st_size} bytes where {size} were written"
    if digest is not None and sha256(path, advance) != digest:
        return "is damaged (its checksum differs)"
    return None


def tensors_problem(path: Path, keys: Collection[str]) -> str | None:
    """Describe what is wrong with the header of a file of tensors, as `problem_of` says it; None if nothing is.

    Args:
        path: of a safetensors file.
        keys: of the tensors that it should hold, all of them fp32, and no others.
    """
    try:
        with safe_open(path, framework="pt") as file:  # which refuses shapes and offsets that do not fit the file
            different = set(keys) ^ set(file.keys())
            if different:
                return f"and the manifest differ in {first_of(different, 'tensor')}"
            odd = next((key for key in keys if file.get_slice(key).get_dtype() != "F32"), None)
            return None if odd is None else f"holds {odd} as {file.get_slice(odd).get_dtype()} where F32 was written"
    except SafetensorError as error:
        return f"is no safetensors file ({error})"


def seal(path: Path) -> tuple[int, str]:
    """Make a finished file durable; its size in bytes and sha256."""
    sync(path)
    return path.stat().st_size, sha256(path)


def sha256(path: Path, advance: Callable[[int], None] | None = None) -> str:
    """Checksum of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
            if advance is not None:
                advance(len(chunk))
    return digest.hexdigest()


def sync(path: Path) -> None:
    """Make a file or a folder durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
