"""Tokens, the lengths of sequences and the ends of documents, streamed to three files that grow together."""

import hashlib
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from megatron_ponder.base.files import sync

LENGTH = np.dtype("<i4")
END = np.dtype("<i8")
# The format counts the tokens of a sequence in 32 bits; a longer document becomes several sequences.
LONGEST_SEQUENCE = (1 << 31) - 1
BLOCK_ENTRIES = 1 << 18
BLOCK_BYTES = 1 << 22


class TokenStreams:
    """Writes tokens as they come, and for each document its sequences; memory does not grow with what is written.

    Args:
        tokens, lengths, ends: files to write: tokens, int32 tokens per sequence, int64 sequences up to the end of each
            document.
        dtype: token dtype.

    Attributes:
        digest: SHA-256 of the tokens so far.
    """

    def __init__(self, tokens: Path, lengths: Path, ends: Path, dtype: np.dtype) -> None:
        self.dtype = np.dtype(dtype)
        self.num_tokens = self.num_sequences = self.num_documents = 0
        self.digest = hashlib.sha256()
        self._open_tokens = 0
        with ExitStack() as opened:
            files = [opened.enter_context(open(path, "wb", buffering=1 << 20)) for path in (tokens, lengths, ends)]
            self._tokens, self._lengths, self._ends = files
            self._open_files = opened.pop_all()

    def add(self, tokens: np.ndarray, counts: np.ndarray, unfinished: bool = False) -> None:
        """Append the tokens of documents, where the first may continue one that is still unfinished.

        Args:
            tokens: (sum of counts,), of the dtype.
            counts: int64 (documents,): tokens of each of them here.
            unfinished: the last document goes on in the next call.
        """
        self._write_tokens(tokens.tobytes())
        if not len(counts):
            return
        counts = counts.astype(np.int64)
        counts[0] += self._open_tokens
        self._open_tokens = 0
        if unfinished:
            self._open_tokens = int(counts[-1])
            counts = counts[:-1]
        self._end_documents(counts)
        while self._open_tokens > LONGEST_SEQUENCE:
            self._write_lengths(np.array([LONGEST_SEQUENCE]))
            self._open_tokens -= LONGEST_SEQUENCE

    def append(self, tokens: Path, lengths: Iterable[np.ndarray], ends: Iterable[np.ndarray]) -> str:
        """Append what other streams or a dataset hold, block by block.

        Args:
            tokens: file of tokens of the same dtype.
            lengths, ends: blocks of the other two streams, see `TokenStreams`.

        Returns:
            The SHA-256 of the file of tokens.
        """
        digest = hashlib.sha256()
        with open(tokens, "rb", buffering=0) as file:
            while block := file.read(BLOCK_BYTES):
                digest.update(block)
                self._write_tokens(block)
        before = self.num_sequences
        for block in lengths:
            self._write_lengths(block)
        for block in ends:
            self._write_ends(block + before)
        return digest.hexdigest()

    def sync(self) -> None:
        """Make all three durable."""
        for file in (self._tokens, self._lengths, self._ends):
            sync(file)

    def close(self) -> None:
        self._open_files.close()

    def _end_documents(self, counts: np.ndarray) -> None:
        sequences = np.maximum(1, -(-counts // LONGEST_SEQUENCE))
        last = np.cumsum(sequences)
        ends = self.num_sequences + last
        lengths = np.full(last[-1] if len(last) else 0, LONGEST_SEQUENCE)
        lengths[last - 1] = counts - (sequences - 1) * LONGEST_SEQUENCE
        self._write_lengths(lengths)
        self._write_ends(ends)

    def _write_tokens(self, content: bytes) -> None:
        self.digest.update(content)
        self._tokens.write(content)
        self.num_tokens += len(content) // self.dtype.itemsize

    def _write_lengths(self, lengths: np.ndarray) -> None:
        self._lengths.write(lengths.astype(LENGTH).tobytes())
        self.num_sequences += len(lengths)

    def _write_ends(self, ends: np.ndarray) -> None:
        self._ends.write(ends.astype(END).tobytes())
        self.num_documents += len(ends)


def blocks_of_file(path: Path, dtype: np.dtype) -> Iterator[np.ndarray]:
    """The numbers in a file, in blocks small enough to hold."""
    with open(path, "rb") as file:
        while content := file.read(BLOCK_ENTRIES * dtype.itemsize):
            yield np.frombuffer(content, dtype)


def blocks_of_array(array: np.ndarray) -> Iterator[np.ndarray]:
    """Views of an array, which may be mapped from a file, in blocks small enough to work on."""
    for start in range(0, len(array), BLOCK_ENTRIES):
        yield array[start : start + BLOCK_ENTRIES]
