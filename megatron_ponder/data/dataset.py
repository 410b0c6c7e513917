"""Samples of tokens from an indexed dataset."""

from pathlib import Path

import numpy as np

from megatron_ponder.data.indexed_dataset import IndexedDataset
from megatron_ponder.data.sample_index import SampleIndex
from megatron_ponder.data.splits import split_documents
from megatron_ponder.errors import UserError


class TokenDataset:
    """Endless samples from a range of documents, see `SampleIndex`.

    Args:
        indexed: where the tokens are.
        documents: the documents to use.
        sequence_length: S; a sample has S + 1 tokens, inputs and targets overlapping in all but one.

    Raises:
        UserError: the documents hold fewer than S + 1 tokens.
    """

    def __init__(self, indexed: IndexedDataset, documents: range, sequence_length: int, seed: int, shuffle: bool):
        self.indexed = indexed
        self.documents = documents
        lengths = indexed.document_lengths[documents.start : documents.stop]
        self.index = SampleIndex(lengths, sequence_length, seed, shuffle)

    @property
    def samples_per_epoch(self) -> int:
        return self.index.samples_per_epoch

    def __getitem__(self, position: int) -> np.ndarray:
        """int64 (S + 1,): the sample at a position counted over all epochs."""
        pieces = [
            self.indexed.read_document(self.documents[piece.document], piece.offset, piece.length)
            for piece in self.index.locate(position)
        ]
        return np.concatenate(pieces, dtype=np.int64)


def build_datasets(prefix: str | Path, split: str, sequence_length: int, seed: int) -> dict[str, TokenDataset]:
    """The "train", "valid" and "test" parts of a dataset; a part of weight 0 is absent. Only training is shuffled.

    Args:
        prefix: path of the dataset without `.bin` and `.idx`.
        split: weights of the parts, see `parse_split`.

    Raises:
        UserError: the dataset cannot be read, or a part with a weight holds too little for one sample.
    """
    indexed = IndexedDataset(prefix)
    datasets = {}
    for name, documents in split_documents(indexed.num_documents, split).items():
        if not documents:
            raise UserError(
                f'data.split "{split}" leaves no document of {prefix}, which has {indexed.num_documents}, for {name}: '
                "give it a larger weight, or 0 to go without"
            )
        try:
            datasets[name] = TokenDataset(indexed, documents, sequence_length, seed, shuffle=name == "train")
        except UserError as error:
            raise UserError(f"{name} part of {prefix}: {error}") from None
    return datasets
