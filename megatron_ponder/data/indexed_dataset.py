"""Megatron's indexed dataset, version 1: tokens in `{prefix}.bin`, where each sequence lies in `{prefix}.idx`.

`.bin` holds nothing but tokens. `.idx`, little-endian and without padding, holds

    9 bytes  magic "MMIDIDX\\0\\0"
    u64      version, 1
    u8       code of the token dtype, see `DTYPES`
    u64      S, the number of sequences
    u64      D + 1, for D documents
    i32[S]   length of each sequence in tokens
    i64[S]   where each sequence begins in `.bin`, in bytes
    i64[D+1] first sequence of each document; begins with 0 and ends with S
"""

import os
import struct
from pathlib import Path
from typing import BinaryIO

import numpy as np

from megatron_ponder.base.errors import UserError
from megatron_ponder.data.token_streams import BLOCK_ENTRIES, blocks_of_array

HEADER = struct.Struct("<9sQBQQ")
MAGIC = b"MMIDIDX\0\0"
VERSION = 1
DTYPES = {
    1: np.dtype("u1"),
    2: np.dtype("i1"),
    3: np.dtype("<i2"),
    4: np.dtype("<i4"),
    5: np.dtype("<i8"),
    6: np.dtype("<f8"),
    7: np.dtype("<f4"),
    8: np.dtype("<u2"),
}


def dataset_paths(prefix: str | Path) -> tuple[Path, Path]:
    """The `.bin` and the `.idx` file of a dataset."""
    return Path(f"{prefix}.bin"), Path(f"{prefix}.idx")


def dtype_for_vocabulary(vocab_size: int) -> np.dtype:
    """The dtype Megatron stores tokens in: two bytes each below 65500 tokens, else four."""
    return np.dtype("<u2") if vocab_size < 65500 else np.dtype("<i4")


class IndexedDataset:
    """A dataset on disk, memory-mapped, so that opening it costs the same whatever its size.

    Args:
        prefix: path of the two files without `.bin` and `.idx`.

    Raises:
        UserError: a file is missing or empty, or header and file sizes contradict each other.
    """

    def __init__(self, prefix: str | Path) -> None:
        self.prefix = Path(prefix)
        bin_path, idx_path = dataset_paths(prefix)
        for path in (bin_path, idx_path):
            if not path.is_file():
                raise UserError(
                    f"{path} does not exist; give the path of a dataset without .bin or .idx, "
                    "or make one with ponder preprocess"
                )
        self.dtype, num_sequences, num_boundaries = _read_header(idx_path)
        # Samples are read and not mapped, because a file that has become shorter, or a disk that fails, would kill a
        # process that maps it.
        self._files = [path.open("rb", buffering=0) for path in (bin_path, idx_path)]  # for as long as this exists
        self._states = [_state(file) for file in self._files]
        self._file, idx_file = self._files
        self._index = np.memmap(idx_file, np.uint8, mode="r")
        lengths_at = HEADER.size
        offsets_at = lengths_at + 4 * num_sequences
        documents_at = offsets_at + 8 * num_sequences
        self.sequence_lengths = np.frombuffer(self._index, "<i4", num_sequences, lengths_at)
        self.sequence_offsets = np.frombuffer(self._index, "<i8", num_sequences, offsets_at)
        self.document_indices = np.frombuffer(self._index, "<i8", num_boundaries, documents_at)

        if self.document_indices[0] != 0 or self.document_indices[-1] != num_sequences:
            raise _damaged(idx_path, f"has documents that do not span its {num_sequences} sequences")
        expected = int(self.sequence_offsets[-1]) + int(self.sequence_lengths[-1]) * self.dtype.itemsize
        actual = bin_path.stat().st_size
        if actual != expected:
            raise _damaged(bin_path, f"has {actual} bytes where {idx_path.name} says {expected}")
        if actual == 0:
            raise _damaged(bin_path, "holds no tokens")
        self._tokens = np.memmap(bin_path, self.dtype, mode="r")

    def __reduce__(self):
        # A loader worker opens the files again; a memory map cannot travel, and its contents should not.
        return type(self), (self.prefix,)

    def __len__(self) -> int:
        return len(self.sequence_lengths)

    @property
    def num_tokens(self) -> int:
        return len(self._tokens)

    @property
    def num_documents(self) -> int:
        return len(self.document_indices) - 1

    def read(self, sequence: int, offset: int = 0, length: int | None = None) -> np.ndarray:
        """`length` tokens of a sequence from token `offset` on (default: to its end), read-only.

        Raises:
            IndexError: the sequence does not exist or is shorter than that.
            UserError: the index contradicts itself there, or the tokens cannot be read.
        """
        if not 0 <= sequence < len(self):
            raise IndexError(f"sequence {sequence} of {len(self)}")
        start, size = int(self.sequence_offsets[sequence]), int(self.sequence_lengths[sequence])
        end = start + size * self.dtype.itemsize
        following = self.sequence_offsets[sequence + 1] if sequence + 1 < len(self) else self._tokens.nbytes
        if size < 0 or start < 0 or start % self.dtype.itemsize or end != following or end > self._tokens.nbytes:
            raise _damaged(dataset_paths(self.prefix)[1], "has sequences that do not follow one another")
        available = size - offset
        length = available if length is None else length
        return self._read(start // self.dtype.itemsize, offset, length, available)

    def read_document(self, document: int, offset: int = 0, length: int | None = None) -> np.ndarray:
        """The same of a whole document, whose sequences follow one another in `.bin`.

        Raises:
            IndexError: the document does not exist or is shorter than that.
            UserError: the index contradicts itself there, or the tokens cannot be read.
        """
        start, size = self.span(document)
        available = size - offset
        length = available if length is None else length
        return self._read(start, offset, length, available)

    def span(self, document: int) -> tuple[int, int]:
        """First token of a document, counted over the dataset, and number of its tokens; checks its entries.

        Raises:
            IndexError: the document does not exist.
            UserError: the index contradicts itself there.
        """
        if not 0 <= document < self.num_documents:
            raise IndexError(f"document {document} of {self.num_documents}")
        first, last = self.document_indices.item(document), self.document_indices.item(document + 1)
        start, end = self._start(first), self._start(last)
        if last == first + 1:
            size = self.sequence_lengths.item(first)
        else:
            size = int(self.sequence_lengths[first:last].sum(dtype=np.int64))
        if size < 0 or start + size != end:
            raise _damaged(dataset_paths(self.prefix)[1], "has sequences that do not follow one another")
        return start, size

    def lengths(self, documents: range) -> "DocumentLengths":
        """Tokens in each of a range of documents, looked up when they are asked for."""
        return DocumentLengths(self, documents)

    @property
    def document_lengths(self) -> np.ndarray:
        """int (D,): tokens in each document; reads the whole index and checks every entry of it.

        Raises:
            UserError: see `check_index`.
        """
        return np.asarray(self.lengths(range(self.num_documents)))

    def _start(self, sequence: int) -> int:
        """First token of a sequence, or for the number of sequences the number of tokens."""
        if sequence == len(self):
            return self.num_tokens
        if not 0 <= sequence < len(self):
            raise _damaged(dataset_paths(self.prefix)[1], "has documents that do not follow one another")
        start, rest = divmod(self.sequence_offsets.item(sequence), self.dtype.itemsize)
        if rest or not 0 <= start <= self.num_tokens:
            raise _damaged(dataset_paths(self.prefix)[1], "has sequences that do not follow one another")
        return start

    def check_index(self) -> None:
        """Check every entry of the index, block by block and so in little memory.

        Raises:
            UserError: sequences or documents do not follow one another.
        """
        _, idx_path = dataset_paths(self.prefix)
        expected = at = last = 0
        for lengths in blocks_of_array(self.sequence_lengths):
            ends = expected + np.cumsum(lengths, dtype=np.int64) * self.dtype.itemsize
            starts = np.concatenate(([expected], ends[:-1]))
            if lengths.min() < 0 or np.any(starts != self.sequence_offsets[at : at + len(lengths)]):
                raise _damaged(idx_path, "has sequences that do not follow one another")
            expected, at = int(ends[-1]), at + len(lengths)
        for indices in blocks_of_array(self.document_indices):
            if indices[0] < last or np.any(np.diff(indices) < 0):
                raise _damaged(idx_path, "has documents that do not follow one another")
            last = int(indices[-1])

    def token_range(self) -> tuple[int, int]:
        """The smallest and the largest token id of all; reads the whole dataset."""
        block = 1 << 24
        blocks = [self._tokens[at : at + block] for at in range(0, self.num_tokens, block)]
        return min(int(part.min()) for part in blocks), max(int(part.max()) for part in blocks)

    def check_unwritten(self) -> None:
        """Raise a `UserError` if somebody has written to the files since they were opened.

        One that is replaced, as commands of this package do, stays open as it was.
        """
        for file, state in zip(self._files, self._states, strict=True):
            if _state(file) != state:
                raise UserError(
                    f"{file.name} has been written to since it was opened; put back what it was, or begin anew with "
                    "what it is"
                )

    def _read(self, start: int, offset: int, length: int, available: int) -> np.ndarray:
        if offset < 0 or not 0 <= length <= available:
            raise IndexError(f"tokens {offset} to {offset + length} of {offset + available}")
        at, wanted = (start + offset) * self.dtype.itemsize, length * self.dtype.itemsize
        path = dataset_paths(self.prefix)[0]
        try:
            content = os.pread(self._file.fileno(), wanted, at)
            while 0 < len(content) < wanted and (
                more := os.pread(self._file.fileno(), wanted - len(content), at + len(content))
            ):
                content += more
        except OSError as error:
            raise UserError(f"{path} cannot be read at byte {at}: {error.strerror}; check its disk") from error
        if len(content) < wanted:
            raise UserError(f"{path} has become shorter since it was opened; put the whole file back")
        return np.frombuffer(content, self.dtype)


class DocumentLengths:
    """Array-like int (D,): tokens in each of D documents that follow one another.

    Single lengths and their sum are looked up in the mapped index, with the entries that they are made of checked, so
    that a run which has the order of its samples needs nothing that grows with the dataset. `numpy.asarray` checks the
    whole index, and takes no memory where each document is one sequence.
    """

    def __init__(self, indexed: IndexedDataset, documents: range) -> None:
        self._indexed, self._documents = indexed, documents

    def __len__(self) -> int:
        return len(self._documents)

    def __getitem__(self, document: int) -> int:
        return self._indexed.span(self._documents[document])[1]

    def sum(self, dtype: type = np.int64) -> np.integer:
        """Tokens in all documents together."""
        first, last = (self._indexed.document_indices.item(at) for at in (self._documents.start, self._documents.stop))
        return dtype(self._indexed._start(last) - self._indexed._start(first))

    def __array__(self, dtype: np.dtype | None = None, copy: bool | None = None) -> np.ndarray:
        indexed = self._indexed
        indexed.check_index()
        firsts = indexed.document_indices[self._documents.start : self._documents.stop + 1]
        begun = int(firsts[0])
        blocks = enumerate(blocks_of_array(firsts))
        if all(np.array_equal(block, np.arange(len(block)) + begun + n * BLOCK_ENTRIES) for n, block in blocks):
            lengths = indexed.sequence_lengths[begun : int(firsts[-1])]
        else:
            starts = indexed.sequence_offsets[np.minimum(firsts, len(indexed) - 1)] // indexed.dtype.itemsize
            lengths = np.diff(np.where(firsts == len(indexed), indexed.num_tokens, starts))
        return np.array(lengths, dtype, copy=copy)


def _read_header(path: Path) -> tuple[np.dtype, int, int]:
    """Token dtype, number of sequences and of document boundaries, once the size of the file agrees with them."""
    with open(path, "rb") as file:
        header = file.read(HEADER.size)
    if len(header) < HEADER.size:
        raise _damaged(path, f"is cut short at {len(header)} bytes")
    magic, version, code, num_sequences, num_boundaries = HEADER.unpack(header)
    if magic != MAGIC:
        raise _damaged(path, "is not an indexed dataset")
    if version != VERSION:
        raise _damaged(path, f"has version {version}, only version {VERSION} can be read")
    if code not in DTYPES or DTYPES[code].kind == "f":
        raise _damaged(path, f"has dtype code {code}, which is not a type of token ids")
    if num_sequences == 0 or num_boundaries == 0:
        raise _damaged(path, "holds no sequences")
    expected = HEADER.size + 12 * num_sequences + 8 * num_boundaries
    actual = path.stat().st_size
    if actual != expected:
        raise _damaged(path, f"has {actual} bytes where its header says {expected}")
    return DTYPES[code], num_sequences, num_boundaries


def _state(file: BinaryIO) -> tuple[int, int]:
    status = os.fstat(file.fileno())
    return status.st_size, status.st_mtime_ns


def _damaged(path: Path, what: str) -> UserError:
    return UserError(f"{path} {what}; make the dataset again with ponder preprocess")
