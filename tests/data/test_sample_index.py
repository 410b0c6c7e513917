import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_ponder.base.errors import UserError
from megatron_ponder.data import sample_index
from megatron_ponder.data.sample_index import SampleIndex, sample_beginnings, stable_order

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


def test_lengths_that_are_not_those_of_the_order_are_refused():
    """One at a time, so that every sample is either whole or refused, and none is of other tokens."""
    lengths = np.array([4, 9, 0, 2, 8, 5])
    for document in range(len(lengths)):
        for change in (-9, -1, 1, 7):
            index = SampleIndex(lengths.copy(), 6, seed=5)
            expected = epoch(index, 0)
            index.document_lengths[document] = max(0, lengths[document] + change)
            refused = 0
            for position, sample in enumerate(expected):
                found = flat_or_refused(index, position)
                assert found in (sample, None)
                refused += found is None
            assert refused or (index.document_lengths == lengths).all() or document == index._epochs[0].documents[-1]


def flat_or_refused(index, position):
    try:
        return flat(index, position)
    except UserError:
        return None


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


def earlier_pieces(lengths, size, seed, position):
    """A sample as the first version of `SampleIndex` found it, from which runs may still go on."""
    samples = (sum(lengths) - 1) // size
    number, position = divmod(position, samples)

    def order(count, stream):
        bits = np.random.PCG64(np.random.SeedSequence(seed, spawn_key=(number, stream)))
        return np.argsort(bits.random_raw(count), kind="stable")

    documents = order(len(lengths), 0)
    starts = np.concatenate(([0], np.cumsum(np.array(lengths)[documents])))
    token = int(order(samples, 1)[position]) * size
    place = int(np.searchsorted(starts, token, side="right")) - 1
    missing, pieces = size + 1, []
    while missing:
        length = min(missing, int(starts[place + 1]) - token)
        if length:
            pieces.append((int(documents[place]), token - int(starts[place]), length))
        token, missing, place = token + length, missing - length, place + 1
    return pieces


@given(LENGTHS, st.integers(0, 2**40), st.data())
def test_the_order_is_that_of_runs_made_before(lengths, seed, data):
    size = data.draw(st.integers(1, sum(lengths) - 1))
    index = SampleIndex(np.array(lengths, np.int32), size, seed)
    for position in range(2 * index.samples_per_epoch):
        assert index.locate(position) == earlier_pieces(lengths, size, seed, position)


KEY = st.integers(0, 2**64 - 1) | st.integers(0, 40) | st.integers(2**63, 2**63 + 40)


@given(st.lists(KEY, max_size=60))
def test_keys_that_differ_little_or_not_are_ordered_stably(keys):
    keys = np.array(keys, np.uint64)
    order = stable_order(keys)
    assert order.dtype == np.int32
    np.testing.assert_array_equal(order, np.argsort(keys, kind="stable"))


def test_many_keys_are_ordered_like_argsort():
    keys = np.random.PCG64(3).random_raw(200_000)
    keys[::3] &= np.uint64(0xFFF)  # with many that are equal
    np.testing.assert_array_equal(stable_order(keys), np.argsort(keys, kind="stable"))


def beginnings_token_by_token(lengths, order, size):
    """Written down while walking along the joined documents."""
    rows, at = [(0, 0)], 0
    for place, document in enumerate(order):
        for offset in range(lengths[document]):
            if at and at % size == 0:
                rows.append((place, offset))
            at += 1
    return rows


ORDERED = LENGTHS.flatmap(
    lambda lengths: st.tuples(
        st.just(lengths),
        st.lists(st.integers(0, len(lengths) - 1), min_size=1, max_size=60).filter(
            lambda order: sum(lengths[document] for document in order) > 1
        ),
    )
)


@given(ORDERED, st.sampled_from([(1 << 15, 1 << 16), (3, 4), (1, 1), (7, 2)]), st.data())
def test_where_samples_begin(ordered, blocks, data):
    lengths, order = ordered
    num_tokens = sum(lengths[document] for document in order)
    size = data.draw(st.integers(1, num_tokens - 1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sample_index, "DOCUMENTS_AT_ONCE", blocks[0])
        patch.setattr(sample_index, "SAMPLES_AT_ONCE", blocks[1])
        rows = sample_beginnings(np.array(lengths, np.int32), np.array(order, np.int32), size, num_tokens)
    assert rows.dtype == np.int32 and rows.flags.c_contiguous
    assert rows.tolist() == [list(row) for row in beginnings_token_by_token(lengths, order, size)]
    assert len(rows) == (num_tokens - 1) // size + 1


GIANT = np.array([0, 1, 5_000_000_000, 0, 3])


def test_a_giant_document_needs_64_bits_and_no_memory_beside_the_result():
    rows = sample_beginnings(GIANT, np.array([3, 1, 2, 0, 4]), 1_000_000, int(GIANT.sum()))
    assert rows.dtype == np.int64
    assert rows.shape == (5001, 2)
    assert rows[:2].tolist() == [[0, 0], [2, 999_999]] and rows[-1].tolist() == [2, 4_999_999_999]


def test_one_token_documents():
    rows = sample_beginnings(np.ones(100_000, np.int32), np.arange(100_000), 7, 100_000)
    assert rows.tolist() == [[7 * j, 0] for j in range(99_999 // 7 + 1)]
