"""Which tokens make up a sample: a pure function of (seed, epoch, position)."""

from collections import OrderedDict
from typing import NamedTuple

import numpy as np

from megatron_ponder.errors import UserError

DOCUMENT_STREAM, SAMPLE_STREAM = 0, 1
EPOCHS_KEPT = 2


class Piece(NamedTuple):
    """Part of a sample: `length` tokens of a document from token `offset` on."""

    document: int
    offset: int
    length: int


class _Epoch(NamedTuple):
    """Order of documents (D,), first token of each in that order (D + 1,), and order of samples."""

    documents: np.ndarray
    starts: np.ndarray
    samples: np.ndarray


class SampleIndex:
    """Cuts an endless stream of shuffled epochs into samples of S + 1 tokens.

    In each epoch the documents are joined in a random order. Sample j begins at token j·S of that stream, so that it
    shares its last token, the target of its last position, with the next one; fewer than S tokens at the end are left
    over. Then the samples of the epoch are shuffled as well.

    Args:
        document_lengths: int (D,), tokens in each document.
        sequence_length: S.
        seed: another seed, another order; not negative.
        shuffle: False keeps documents and samples in their own order, in every epoch.

    Raises:
        UserError: there are fewer than S + 1 tokens.
    """

    def __init__(self, document_lengths: np.ndarray, sequence_length: int, seed: int, shuffle: bool = True):
        self.document_lengths = np.asarray(document_lengths, dtype=np.int64)
        self.sequence_length = sequence_length
        self.seed = seed
        self.shuffle = shuffle
        num_tokens = int(self.document_lengths.sum())
        self.samples_per_epoch = (num_tokens - 1) // sequence_length
        if self.samples_per_epoch < 1:
            raise UserError(
                f"sequence longer than the data: {num_tokens} tokens hold no sample of {sequence_length} + 1; "
                + (f"set data.sequence_length to at most {num_tokens - 1}" if num_tokens > 1 else "give more data")
            )
        self._epochs: OrderedDict[int, _Epoch] = OrderedDict()

    def locate(self, position: int) -> list[Piece]:
        """The pieces of sample `position`, counted over all epochs, in reading order; none is empty."""
        assert position >= 0
        number, position = divmod(position, self.samples_per_epoch)
        epoch = self._epoch(number)
        token = int(epoch.samples[position]) * self.sequence_length
        missing = self.sequence_length + 1
        # Of several documents that start at the same token, all but the last are empty.
        place = int(np.searchsorted(epoch.starts, token, side="right")) - 1
        pieces = []
        while missing:
            length = min(missing, int(epoch.starts[place + 1]) - token)
            if length:
                pieces.append(Piece(int(epoch.documents[place]), token - int(epoch.starts[place]), length))
            token += length
            missing -= length
            place += 1
        return pieces

    def _epoch(self, number: int) -> _Epoch:
        # Positions rise, but loader workers may read the end of one epoch and the beginning of the next by turns.
        if number not in self._epochs:
            documents = self._order(len(self.document_lengths), number, DOCUMENT_STREAM)
            starts = np.concatenate(([0], np.cumsum(self.document_lengths[documents])))
            samples = self._order(self.samples_per_epoch, number, SAMPLE_STREAM)
            self._epochs[number] = _Epoch(documents, starts, samples)
            if len(self._epochs) > EPOCHS_KEPT:
                self._epochs.popitem(last=False)
        return self._epochs[number]

    def _order(self, count: int, epoch: int, stream: int) -> np.ndarray:
        if not self.shuffle:
            return np.arange(count)
        # NumPy promises that raw bits stay the same in all its versions, which it does not of `permutation`.
        bits = np.random.PCG64(np.random.SeedSequence(self.seed, spawn_key=(epoch, stream)))
        return np.argsort(bits.random_raw(count), kind="stable")
