import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ponder.data.sample_index import SampleIndex
from megatron_ponder.errors import UserError

LENGTHS = st.lists(st.integers(0, 12), min_size=1, max_size=30).filter(lambda lengths: sum(lengths) > 1)


def flat(index, position):
    """Each token of a sample as (document, place in it)."""
    return [(piece.document, piece.offset + i) for piece in index.locate(position) for i in range(piece.length)]


def epoch(index, number):
    return [flat(index, number * index.samples_per_epoch + j) for j in range(index.samples_per_epoch)]


def join(documents, lengths):
    return [(document, place) for document in documents for place in range(lengths[document])]


@given(LENGTHS, st.data())
def test_without_shuffling_samples_are_those_of_the_joined_documents(lengths, data):
    size = data.draw(st.integers(1, sum(lengths) - 1))
    index = SampleIndex(np.array(lengths), size, seed=0, shuffle=False)
    stream = join(range(len(lengths)), lengths)
    expected = [stream[at : at + size + 1] for at in range(0, len(stream) - size, size)]
    assert index.samples_per_epoch == len(expected)
    assert epoch(index, 0) == epoch(index, 3) == expected


@settings(deadline=None)
@given(LENGTHS, st.integers(0, 2**40), st.integers(0, 3), st.data())
def test_an_epoch_is_a_shuffle_of_a_shuffled_stream(lengths, seed, number, data):
    size = data.draw(st.integers(1, sum(lengths) - 1))
    index = SampleIndex(np.array(lengths), size, seed)
    samples = epoch(index, number)

    # Link each sample to the one that begins with its last token: that is the stream they were cut from.
    by_first = {sample[0]: sample for sample in samples}
    assert len(by_first) == len(samples) == (sum(lengths) - 1) // size
    targets = {sample[-1] for sample in samples}
    (first,) = [sample for sample in samples if sample[0] not in targets]
    stream = list(first)
    while stream[-1] in by_first:
        stream += by_first[stream[-1]][1:]
    assert len(stream) == len(samples) * size + 1

    # And that stream is the beginning of some order of whole documents.
    order = list(dict.fromkeys(document for document, _ in stream))
    assert join(order, lengths)[: len(stream)] == stream


def test_each_document_length_has_its_own_document():
    lengths = np.array([5, 0, 7, 1, 0, 3])
    pieces = SampleIndex(lengths, 15, seed=1).locate(0)
    assert sum(piece.length for piece in pieces) == 16
    assert {piece.document for piece in pieces} == {0, 2, 3, 5}
    assert all(piece.offset >= 0 and 0 < piece.length <= lengths[piece.document] for piece in pieces)


def test_the_order_is_pinned():
    """A change here changes the data that every resumed run reads from there on."""
    index = SampleIndex(np.array([3, 1, 4, 1, 5, 9, 2, 6]), 4, seed=1234)
    assert [flat(index, position)[0] for position in range(2 * index.samples_per_epoch)] == [
        (0, 0),
        (2, 3),
        (5, 7),
        (5, 3),
        (6, 1),
        (3, 0),
        (4, 1),
        (6, 0),
        (5, 3),
        (4, 4),
        (2, 2),
        (4, 0),
        (7, 2),
        (5, 7),
    ]


def test_epochs_and_seeds_have_their_own_orders():
    lengths = np.full(50, 7)
    orders = [epoch(SampleIndex(lengths, 5, seed), number) for seed in (0, 1) for number in (0, 1)]
    assert all(orders[i] != orders[j] for i in range(4) for j in range(i))
    # One sample an epoch leaves only the order of documents to differ.
    orders = [flat(SampleIndex(lengths, 349, seed), number) for seed in (0, 1) for number in (0, 1)]
    assert all(orders[i] != orders[j] for i in range(4) for j in range(i))


@given(st.lists(st.integers(0, 60), max_size=30))
def test_a_position_does_not_depend_on_what_was_asked_before(positions):
    lengths = np.array([4, 9, 0, 2, 8])
    index = SampleIndex(lengths, 3, seed=5)
    assert [index.locate(p) for p in positions] == [SampleIndex(lengths, 3, seed=5).locate(p) for p in positions]


def test_only_two_epochs_are_kept():
    index = SampleIndex(np.full(1000, 10), 10, seed=0)
    for position in range(0, 20 * index.samples_per_epoch, 100):
        index.locate(position)
    assert len(index._epochs) == 2


@pytest.mark.parametrize(
    ("lengths", "size", "advice"),
    [
        ([3, 2], 5, "set data.sequence_length to at most 4"),
        ([3, 2], 4000, "set data.sequence_length to at most 4"),
        ([1], 1, "give more data"),
        ([], 1, "give more data"),
    ],
)
def test_a_sequence_longer_than_the_data(lengths, size, advice):
    with pytest.raises(UserError, match=f"sequence longer than the data: {sum(lengths)} tokens .*; {advice}"):
        SampleIndex(np.array(lengths, dtype=np.int64), size, seed=0)
