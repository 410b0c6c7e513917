"""Writing an indexed dataset, see `indexed_dataset`, as a stream and by one process at a time."""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from megatron_ponder.base.claims import Claim
from megatron_ponder.base.errors import UserError
from megatron_ponder.base.files import make_folder, partial_path, publish, sync, sync_folder
from megatron_ponder.data.indexed_dataset import DTYPES, HEADER, MAGIC, VERSION, IndexedDataset, dataset_paths
from megatron_ponder.data.token_streams import END, LENGTH, TokenStreams, blocks_of_array, blocks_of_file


def writing_claim(prefix: str | Path) -> Claim:
    """The right to write a dataset, for as long as that takes; its folder must exist."""
    return Claim(f"{prefix}.claim", f"the dataset {prefix}", "choose another --output-prefix")


class IndexedDatasetWriter:
    """Context manager that streams documents to disk, one sequence each unless they are too long for that.

    The files appear under their names only when the block ends without an exception; otherwise what was written is
    removed and an older dataset of that name stays as it was. Memory does not grow with what is written: until the end
    the index lies in two more files beside the dataset.

    Args:
        prefix: path of the two files without `.bin` and `.idx`; its folder is made if needed.
        dtype: token dtype, see `dtype_for_vocabulary`.
        claim: the right to write, where the caller has it; else it is taken for as long as the block lasts.

    Attributes:
        streams: where tokens go that are at hand in larger amounts than a document.
        idx_sha256: of the finished index, in hex, once the block has ended.

    Raises:
        UserError: at its beginning, if another process writes this dataset; at its end, if no token was written, or
            the right was lost.
    """

    def __init__(self, prefix: str | Path, dtype: np.dtype, claim: Claim | None = None) -> None:
        self._claim, self._is_own = claim or writing_claim(prefix), claim is None
        self.dtype = np.dtype(dtype)
        self._code = next(code for code, known in DTYPES.items() if known == self.dtype)
        self._limits = np.iinfo(self.dtype)
        self._bin_path, self._idx_path = dataset_paths(prefix)
        self._old_manifest = Path(f"{prefix}.json")
        self._lengths_path = Path(f"{prefix}.lengths.partial")
        self._ends_path = Path(f"{prefix}.documents.partial")

    def __enter__(self) -> "IndexedDatasetWriter":
        make_folder(self._bin_path.parent)
        with ExitStack() as undo:
            if self._is_own:
                self._claim.take()
                undo.callback(self._claim.release)
            paths = partial_path(self._bin_path), self._lengths_path, self._ends_path
            self.streams = TokenStreams(*paths, self.dtype)
            undo.pop_all()
        return self

    @property
    def num_tokens(self) -> int:
        return self.streams.num_tokens

    @property
    def bin_sha256(self) -> str:
        """SHA-256 of the tokens so far, in hex."""
        return self.streams.digest.hexdigest()

    def add_document(self, tokens: Sequence[int] | np.ndarray) -> None:
        """Append one document of token ids, possibly none.

        Raises:
            UserError: an id does not fit the dtype.
        """
        tokens = np.asarray(tokens, dtype=np.int64)
        if len(tokens) and not self._limits.min <= tokens.min() <= tokens.max() <= self._limits.max:
            raise UserError(f"token ids {tokens.min()} to {tokens.max()} do not fit {self.dtype}; check the tokenizer")
        self.streams.add(tokens.astype(self.dtype), np.array([len(tokens)]))

    def append_dataset(self, dataset: IndexedDataset) -> str:
        """Append all of another dataset of the same dtype, its documents and sequences as they are.

        Returns:
            The SHA-256 of its `.bin`.
        """
        bin_path, _ = dataset_paths(dataset.prefix)
        return self.streams.append(
            bin_path, blocks_of_array(dataset.sequence_lengths), blocks_of_array(dataset.document_indices[1:])
        )

    def __exit__(self, exception_type, exception, traceback) -> None:
        with ExitStack() as cleanup:
            if self._is_own:
                cleanup.callback(self._claim.release)
            partial = (partial_path(self._bin_path), partial_path(self._idx_path), self._lengths_path, self._ends_path)
            for path in partial:
                cleanup.callback(path.unlink, missing_ok=True)
            cleanup.callback(self.streams.close)
            if exception_type is None:
                self._finish()

    def _finish(self) -> None:
        if self.num_tokens == 0:
            raise UserError(f"{self._bin_path} would hold no tokens; check the input")
        self.streams.sync()
        digest = hashlib.sha256()
        with open(partial_path(self._idx_path), "wb") as file:
            for block in self._index_blocks():
                digest.update(block)
                file.write(block)
            sync(file)
        self.idx_sha256 = digest.hexdigest()
        self._claim.verify()
        # Between the renames there is no index at all, rather than an old one beside new tokens; and the manifest of
        # the older dataset must not stay to describe the new one.
        self._idx_path.unlink(missing_ok=True)
        self._old_manifest.unlink(missing_ok=True)
        publish(self._bin_path)
        publish(self._idx_path)
        sync_folder(self._bin_path.parent)

    def _index_blocks(self) -> Iterator[bytes]:
        streams = self.streams
        yield HEADER.pack(MAGIC, VERSION, self._code, streams.num_sequences, streams.num_documents + 1)
        yield from (block.tobytes() for block in blocks_of_file(self._lengths_path, LENGTH))
        offset = 0
        for block in blocks_of_file(self._lengths_path, LENGTH):
            ends = offset + np.cumsum(block, dtype="<i8") * self.dtype.itemsize
            yield np.concatenate(([offset], ends[:-1]), dtype="<i8").tobytes()
            offset = int(ends[-1])
        yield bytes(END.itemsize)
        yield from (block.tobytes() for block in blocks_of_file(self._ends_path, END))
