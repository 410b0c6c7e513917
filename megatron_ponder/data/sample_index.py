"""Which tokens make up a sample: a pure function of (seed, epoch, position)."""

from collections import OrderedDict
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

from megatron_ponder.base.errors import UserError
from megatron_ponder.data.index_cache import IndexCache
from megatron_ponder.data.indexed_dataset import DocumentLengths

DOCUMENT_STREAM, SAMPLE_STREAM = 0, 1
EPOCHS_KEPT = 2
DOCUMENTS_AT_ONCE = 1 << 13
SAMPLES_AT_ONCE = 1 << 13


class Piece(NamedTuple):
    """Part of a sample: `length` tokens of a document from token `offset` on."""

    document: int
    offset: int
    length: int


def within(pieces: Iterable[Piece], first: int, length: int) -> Iterator[Piece]:
    """What pieces have of the tokens `first` to `first + length` of all of them together."""
    for document, offset, count in pieces:
        begin, end = max(first, 0), min(first + length, count)
        if begin < end:
            yield Piece(document, offset + begin, end - begin)
        first -= count


class _Epoch(NamedTuple):
    """Order of documents (D,), where each sample begins in that order (n + 1, 2), and order of samples (n,)."""

    documents: np.ndarray
    beginnings: np.ndarray
    samples: np.ndarray


class SampleIndex:
    """Cuts an endless stream of shuffled epochs into samples of S + 1 tokens.

    In each epoch the documents are joined in a random order. Sample j begins at token j·S of that stream, so that it
    shares its last token, the target of its last position, with the next one; fewer than S tokens at the end are left
    over. Then the samples of the epoch are shuffled as well.

    Args:
        document_lengths: int (D,), tokens in each document: an array, or what looks lengths up when they are asked for.
        sequence_length: S.
        seed: another seed, another order; not negative.
        shuffle: False keeps documents and samples in their own order, in every epoch.
        cache: where the arrays of an epoch are kept for all processes; None for the memory of this one.
        content: what tells `document_lengths` from others in the cache.

    Raises:
        UserError: there are fewer than S + 1 tokens.
    """

    def __init__(
        self,
        document_lengths: np.ndarray | DocumentLengths,
        sequence_length: int,
        seed: int,
        shuffle: bool = True,
        cache: IndexCache | None = None,
        content: str = "",
    ) -> None:
        self.document_lengths = document_lengths
        self.sequence_length = sequence_length
        self.seed = seed
        self.shuffle = shuffle
        self._cache = cache
        self._content = content
        self._num_tokens = int(self.document_lengths.sum(dtype=np.int64))
        self.samples_per_epoch = (self._num_tokens - 1) // sequence_length
        if self.samples_per_epoch < 1:
            raise UserError(
                f"sequence longer than the data: {self._num_tokens} tokens hold no sample of {sequence_length} + 1; "
                + (
                    f"set data.sequence_length to at most {self._num_tokens - 1}"
                    if self._num_tokens > 1
                    else "give more data"
                )
            )
        self._epochs: OrderedDict[int, _Epoch] = OrderedDict()

    def locate(self, position: int) -> list[Piece]:
        """The pieces of sample `position`, counted over all epochs, in reading order; none is empty.

        Raises:
            UserError: the lengths are not those that the order was made of.
        """
        assert position >= 0
        number, position = divmod(position, self.samples_per_epoch)
        epoch = self._epoch(number)
        sample = epoch.samples[position]
        (place, offset), last = epoch.beginnings[sample : sample + 2].tolist()
        missing = self.sequence_length + 1
        pieces = []
        while missing and place <= last[0]:
            document = int(epoch.documents[place])
            length = min(missing, int(self.document_lengths[document]) - offset)
            if length < 0:
                break
            if length:
                pieces.append(Piece(document, offset, length))
                missing -= length
                end = [place, offset + length - 1]
            place, offset = place + 1, 0
        # A sample ends with the token that the next one begins with.
        if missing or end != last:
            raise UserError(
                "documents are not as long as when the order of the samples was built; make or copy the dataset again"
            )
        return pieces

    def prepare(self, epoch: int) -> None:
        """Build the arrays of an epoch, or find them in the cache, before they are needed."""
        self._epoch(epoch)

    def _epoch(self, number: int) -> _Epoch:
        number = number if self.shuffle else 0
        # Positions rise, but loader workers may read the end of one epoch and the beginning of the next by turns.
        if number not in self._epochs:
            if self._cache is None:
                epoch = self._build(number)
            else:
                order = f"seed {self.seed} epoch {number}" if self.shuffle else "unshuffled"
                description = f"{self._content} sequences of {self.sequence_length} {order}"
                epoch = _Epoch(*self._cache.load(description, lambda: self._build(number)))
            self._epochs[number] = epoch
            if len(self._epochs) > EPOCHS_KEPT:
                self._epochs.popitem(last=False)
        return self._epochs[number]

    def _build(self, number: int) -> _Epoch:
        lengths = np.asarray(self.document_lengths)
        documents = self._order(len(lengths), number, DOCUMENT_STREAM)
        beginnings = sample_beginnings(lengths, documents, self.sequence_length, self._num_tokens)
        return _Epoch(documents, beginnings, self._order(self.samples_per_epoch, number, SAMPLE_STREAM))

    def _order(self, count: int, epoch: int, stream: int) -> np.ndarray:
        if not self.shuffle:
            return np.arange(count, dtype=_index_dtype(count))
        # NumPy promises that raw bits stay the same in all its versions, which it does not of `permutation`.
        bits = np.random.PCG64(np.random.SeedSequence(self.seed, spawn_key=(epoch, stream)))
        return stable_order(bits.random_raw(count))


def sample_beginnings(
    document_lengths: np.ndarray, order: np.ndarray, sequence_length: int, num_tokens: int
) -> np.ndarray:
    """Where samples begin in documents joined in some order: what Megatron's `build_sample_idx` returns, bit for bit.

    Besides the result it takes memory for some ten thousand documents and samples only.

    Args:
        document_lengths: int (D,), tokens in each document.
        order: int (P,), the documents that are joined; any of them may come several times, as in Megatron's index of
            several epochs.
        sequence_length: S; sample j begins at token j·S.
        num_tokens: of all documents in `order` together, at least S + 1.

    Returns:
        int32 (n + 1, 2) for n = (num_tokens - 1) // S, or int64 where int32 is too small: the place in `order` of the
        document that holds the sample's first token, and that token's offset in the document. The last row is the
        token that the last sample ends with.
    """
    count = (num_tokens - 1) // sequence_length + 1
    beginnings = np.empty((count, 2), _index_dtype(max(len(order), int(document_lengths.max()))))
    done = 0
    for place in range(0, len(order), DOCUMENTS_AT_ONCE):
        # `clip` spares a check: all numbers in an order are of documents.
        lengths = document_lengths.take(order[place : place + DOCUMENTS_AT_ONCE], mode="clip")
        ends = lengths.astype(np.int64)
        np.cumsum(ends, out=ends)
        ends += done
        first, done = -(-done // sequence_length), int(ends[-1])
        # The first sample that begins at or after the end of each document, so that the document of sample j is the
        # number of entries up to j.
        following = ends + (sequence_length - 1)
        following //= sequence_length
        stop = min(int(following[-1]), count)
        for low in range(first, stop, SAMPLES_AT_ONCE):
            high = min(low + SAMPLES_AT_ONCE, stop)
            inside = slice(*np.searchsorted(following, (low, high)))
            documents = np.bincount(following[inside] - low, minlength=high - low)
            np.cumsum(documents, out=documents)
            documents += inside.start
            offsets = np.arange(low * sequence_length, high * sequence_length, sequence_length)
            offsets -= ends[documents]
            offsets += lengths[documents]
            documents += place
            beginnings[low:high, 0] = documents
            beginnings[low:high, 1] = offsets
    beginnings[0] = 0  # the very first document, though it may be empty
    return beginnings


def stable_order(keys: np.ndarray) -> np.ndarray:
    """`np.argsort(keys, kind="stable")` of uint64 (n,), several times faster for random keys; int32 where it fits.

    Sorting numbers is faster than sorting places, so each place travels in the low bits of its key. Keys that differ
    in those bits alone are then sorted again.
    """
    low_bits = np.uint64(max(len(keys) - 1, 0).bit_length())
    places = np.uint64((1 << int(low_bits)) - 1)
    packed = keys & ~places
    packed |= np.arange(len(keys), dtype=np.uint64)
    packed.sort()
    order = (packed & places).astype(_index_dtype(len(keys)))
    packed >>= low_bits
    (equal,) = np.nonzero(packed[1:] == packed[:-1])
    if len(equal):
        doubtful = np.union1d(equal, equal + 1)
        among = order[doubtful]
        order[doubtful] = among[np.argsort(keys[among], kind="stable")]
    return order


def _index_dtype(largest: int) -> type[np.signedinteger]:
    return np.int32 if largest <= np.iinfo(np.int32).max else np.int64
