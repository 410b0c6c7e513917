"""Samples of tokens from an indexed dataset."""

from typing import NamedTuple

import numpy as np

from megatron_ponder.base.errors import UserError
from megatron_ponder.data.index_cache import IndexCache
from megatron_ponder.data.indexed_dataset import IndexedDataset
from megatron_ponder.data.sample_index import Piece, SampleIndex, within
from megatron_ponder.data.splits import split_documents


class Share(NamedTuple):
    """A part of every sample: of `ranks` equal parts, each of tokens in a row, the one at a place."""

    place: int = 0
    ranks: int = 1


class TokenDataset:
    """Endless samples from a range of documents, see `SampleIndex`.

    Args:
        indexed: where the tokens are.
        documents: the documents to use.
        sequence_length: S; a sample has S + 1 tokens, inputs and targets overlapping in all but one.
        cache: where the order is kept for all processes; None for the memory of this one.
        content: fingerprint of the dataset, needed with a cache.

    Raises:
        UserError: the documents hold fewer than S + 1 tokens.
    """

    def __init__(
        self,
        indexed: IndexedDataset,
        documents: range,
        sequence_length: int,
        seed: int,
        shuffle: bool,
        cache: IndexCache | None = None,
        content: str = "",
    ) -> None:
        assert cache is None or content
        self._arguments = (indexed, documents, sequence_length, seed, shuffle, cache, content)
        self.indexed = indexed
        self.documents = documents
        content = f"{content} documents {documents.start} to {documents.stop}"
        self.index = SampleIndex(indexed.lengths(documents), sequence_length, seed, shuffle, cache, content)

    def __reduce__(self):
        # A loader worker opens the files again, rather than being sent the arrays.
        return type(self), self._arguments

    @property
    def samples_per_epoch(self) -> int:
        return self.index.samples_per_epoch

    def __getitem__(self, position: int) -> np.ndarray:
        """int64 (S + 1,): the sample at a position counted over all epochs.

        Raises:
            UserError: the dataset is damaged there, was written to, or is not the one that the order was made for.
        """
        return self.read(position, Share())

    def read(self, position: int, share: Share) -> np.ndarray:
        """int64 (S / ranks + 1,): a share of a sample and the token behind it, the target of its last; no other token.

        Args:
            position: of the sample.
            share: of its S tokens.

        Raises:
            UserError: as `__getitem__`.
        """
        length = self.index.sequence_length // share.ranks
        wanted = within(self._locate(position), share.place * length, length + 1)
        pieces = [
            self.indexed.read_document(self.documents[piece.document], piece.offset, piece.length) for piece in wanted
        ]
        self.indexed.check_unwritten()
        return np.concatenate(pieces, dtype=np.int64)

    def describe(self, position: int) -> str:
        """Where the sample at a position is from."""
        first, *others = [self.documents[piece.document] for piece in self._locate(position)]
        more = f" and {len(others)} more" if others else ""
        return f"document {first}{more} of {self.indexed.prefix}"

    def _locate(self, position: int) -> list[Piece]:
        try:
            return self.index.locate(position)
        except UserError as error:
            raise UserError(f"{self.indexed.prefix}: {error}") from None

    def streams(self, samples: int) -> list[tuple["TokenDataset", int]]:
        """The datasets that the first `samples` samples are of, with how many of each: here this one alone."""
        return [(self, samples)]

    def prepare(self, position: int) -> None:
        """Have the order of the epoch of a position ready before processes that read are started."""
        self.index.prepare(position // self.samples_per_epoch)


def open_part(
    indexed: IndexedDataset,
    name: str,
    split: str,
    sequence_length: int,
    seed: int,
    cache: IndexCache | None = None,
    content: str = "",
) -> TokenDataset | None:
    """The "train", "valid" or "test" part of a dataset, or None if it has weight 0. Only training is shuffled.

    Args:
        split: weights of the parts, see `parse_split`.
        cache, content: see `TokenDataset`.

    Raises:
        UserError: the part has a weight but holds too little for one sample.
    """
    documents = split_documents(indexed.num_documents, split).get(name)
    if documents is None:
        return None
    if not documents:
        raise UserError(
            f'data.split "{split}" leaves no document of {indexed.prefix}, which has {indexed.num_documents}, for '
            f"{name}; give it a larger weight, or 0 to go without"
        )
    try:
        return TokenDataset(indexed, documents, sequence_length, seed, name == "train", cache, content)
    except UserError as error:
        raise UserError(f"{name} part of {indexed.prefix}: {error}") from None
