import os
import pickle
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ponder.base.errors import UserError
from megatron_ponder.data.dataset_writer import IndexedDatasetWriter
from megatron_ponder.data.indexed_dataset import (
    DTYPES,
    HEADER,
    IndexedDataset,
    dataset_paths,
    dtype_for_vocabulary,
)

DOCUMENTS = [[1, 2, 3], [], [4], [5, 6]]


def write(prefix, documents, dtype="<u2"):
    with IndexedDatasetWriter(prefix, np.dtype(dtype)) as writer:
        for document in documents:
            writer.add_document(document)


@pytest.fixture
def prefix(tmp_path):
    write(tmp_path / "small", DOCUMENTS)
    return tmp_path / "small"


def test_bytes_are_those_of_the_format(prefix):
    bin_path, idx_path = dataset_paths(prefix)
    assert bin_path.read_bytes() == struct.pack("<6H", 1, 2, 3, 4, 5, 6)
    assert idx_path.read_bytes() == (
        b"MMIDIDX\x00\x00"
        + struct.pack("<QBQQ", 1, 8, 4, 5)
        + struct.pack("<4i", 3, 0, 1, 2)
        + struct.pack("<4q", 0, 6, 6, 8)
        + struct.pack("<5q", 0, 1, 2, 3, 4)
    )
    assert sorted(path.name for path in prefix.parent.iterdir()) == ["small.bin", "small.idx"]


@pytest.mark.parametrize(
    ("vocab_size", "dtype", "code"), [(65499, "<u2", 8), (65500, "<i4", 4), (65536, "<i4", 4), (70000, "<i4", 4)]
)
def test_dtype_follows_the_vocabulary(tmp_path, vocab_size, dtype, code):
    assert dtype_for_vocabulary(vocab_size) == np.dtype(dtype)
    write(tmp_path / "data", [[0, vocab_size - 1]], dtype_for_vocabulary(vocab_size))
    assert dataset_paths(tmp_path / "data")[1].read_bytes()[17] == code
    assert IndexedDataset(tmp_path / "data").read(0).tolist() == [0, vocab_size - 1]


@settings(max_examples=100)
@given(
    vocab_size=st.sampled_from([2, 65499, 65500, 65536, 1 << 20]),
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=20).filter(any),
    seed=st.integers(0, 1000),
)
def test_reading_gives_back_what_was_written(tmp_path_factory, vocab_size, lengths, seed):
    prefix = tmp_path_factory.getbasetemp() / "round.trip"
    generator = np.random.default_rng(seed)
    documents = [generator.integers(vocab_size - 1, vocab_size, n, endpoint=True) % vocab_size for n in lengths]
    write(prefix, documents, dtype_for_vocabulary(vocab_size))
    dataset = IndexedDataset(prefix)
    assert len(dataset) == dataset.num_documents == len(documents)
    assert dataset.num_tokens == sum(lengths)
    used = np.concatenate(documents)
    assert dataset.token_range() == (used.min(), used.max())
    assert dataset.sequence_lengths.tolist() == dataset.document_lengths.tolist() == lengths
    for number, document in enumerate(documents):
        np.testing.assert_array_equal(dataset.read(number), document)
        np.testing.assert_array_equal(dataset.read_document(number), document)
        for offset in range(len(document) + 1):
            np.testing.assert_array_equal(dataset.read(number, offset), document[offset:])
            np.testing.assert_array_equal(dataset.read(number, offset, 0), [])
        np.testing.assert_array_equal(dataset.read(number, 0, len(document) // 2), document[: len(document) // 2])


@pytest.mark.parametrize("dtype", [d for d in DTYPES.values() if d.kind != "f"], ids=str)
def test_any_integer_dtype_can_be_read(tmp_path, dtype):
    write(tmp_path / "data", DOCUMENTS, dtype)
    dataset = IndexedDataset(tmp_path / "data")
    assert dataset.dtype == dtype
    assert [dataset.read(n).tolist() for n in range(4)] == DOCUMENTS


def test_documents_may_consist_of_several_sequences(prefix):
    _, idx_path = dataset_paths(prefix)
    content = idx_path.read_bytes()
    header = struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, 8, 4, 4)
    boundaries = struct.pack("<4q", 0, 3, 3, 4)
    idx_path.write_bytes(header + content[HEADER.size : HEADER.size + 4 * 12] + boundaries)
    dataset = IndexedDataset(prefix)
    assert (len(dataset), dataset.num_documents) == (4, 3)
    assert dataset.document_lengths.tolist() == [4, 0, 2]
    assert [dataset.read_document(n).tolist() for n in range(3)] == [[1, 2, 3, 4], [], [5, 6]]
    assert dataset.read_document(0, 2, 2).tolist() == [3, 4]


@given(st.lists(st.lists(st.integers(0, 3), max_size=4), min_size=1, max_size=8), st.data())
def test_lengths_of_a_range_of_documents(tmp_path_factory, documents, data):
    """Of documents of no, one or several sequences."""
    sequences = [length for document in documents for length in document]
    if not sum(sequences):
        return
    prefix = tmp_path_factory.getbasetemp() / "ranges"
    ends = np.cumsum(sequences) * 2
    bounds = np.cumsum([0, *map(len, documents)])
    prefix.with_suffix(".bin").write_bytes(bytes(ends[-1]))
    prefix.with_suffix(".idx").write_bytes(
        HEADER.pack(b"MMIDIDX\0\0", 1, 8, len(sequences), len(bounds))
        + np.array(sequences, "<i4").tobytes()
        + (ends - 2 * np.array(sequences)).astype("<i8").tobytes()
        + bounds.astype("<i8").tobytes()
    )
    start = data.draw(st.integers(0, len(documents)))
    stop = data.draw(st.integers(start, len(documents)))
    expected = list(map(sum, documents[start:stop]))
    lengths = IndexedDataset(prefix).lengths(range(start, stop))
    assert len(lengths) == len(expected) and lengths.sum() == sum(expected)
    assert [lengths[document] for document in range(len(lengths))] == expected == np.asarray(lengths).tolist()


def test_lengths_of_documents_of_one_sequence_are_those_of_the_mapped_file(prefix):
    dataset = IndexedDataset(prefix)
    lengths = np.asarray(dataset.lengths(range(1, 4)))
    assert lengths.tolist() == [0, 1, 2]
    assert np.shares_memory(lengths, dataset.sequence_lengths)


@pytest.mark.parametrize("arguments", [(4,), (-1,), (0, 4), (0, -1), (0, 2, 2), (0, 0, -1)])
def test_reading_outside_is_an_index_error(prefix, arguments):
    dataset = IndexedDataset(prefix)
    with pytest.raises(IndexError):
        dataset.read(*arguments)
    with pytest.raises(IndexError):
        dataset.read_document(*arguments)


def test_a_pickled_dataset_reopens_its_files(prefix):
    pickled = pickle.dumps(IndexedDataset(prefix))
    assert len(pickled) < 1000
    assert pickle.loads(pickled).read(0).tolist() == [1, 2, 3]


def test_every_truncation_is_reported(prefix):
    for path in dataset_paths(prefix):
        whole = path.read_bytes()
        for size in range(len(whole)):
            path.write_bytes(whole[:size])
            with pytest.raises(UserError, match=rf"{path.name} .*ponder preprocess"):
                IndexedDataset(prefix)
        path.write_bytes(whole + b"\0")
        with pytest.raises(UserError, match=path.name):
            IndexedDataset(prefix)
        path.write_bytes(whole)
    IndexedDataset(prefix)


EVERY, FLIPS = set(range(256)), [1 << bit for bit in range(8)]


@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["a flipped bit", "every"])
def test_every_corruption_of_the_header_is_reported(prefix, every):
    _, idx_path = dataset_paths(prefix)
    whole = idx_path.read_bytes()
    # A signed type of the same size leaves nothing to notice it by.
    same_size = {code for code, dtype in DTYPES.items() if dtype.itemsize == 2}
    for place in range(HEADER.size):
        for value in EVERY - {whole[place]} if every else {whole[place] ^ flip for flip in FLIPS}:
            if place == 17 and value in same_size:
                continue
            idx_path.write_bytes(whole[:place] + bytes([value]) + whole[place + 1 :])
            with pytest.raises(UserError, match=r"small\.(idx|bin) .*ponder preprocess"):
                IndexedDataset(prefix)


@pytest.mark.parametrize(
    ("place", "format", "value"),
    [
        (HEADER.size + 3 * 4, "<i", 3),  # last length
        (HEADER.size + 4 * 4 + 3 * 8, "<q", 6),  # last offset
        (HEADER.size + 4 * 12, "<q", 1),  # first document
        (HEADER.size + 4 * 12 + 4 * 8, "<q", 3),  # last document
        (HEADER.size, "<i", 2),  # first length
        (HEADER.size, "<i", -3),
        (HEADER.size + 4 * 4 + 8, "<q", 4),  # second offset
        (HEADER.size + 4 * 12 + 8, "<q", 4),  # second document after the third
        (HEADER.size + 4 * 12 + 8, "<q", 1 << 40),
        (HEADER.size + 4 * 12 + 8, "<q", -1),
    ],
)
def test_a_corrupt_index_is_reported(prefix, place, format, value):
    _, idx_path = dataset_paths(prefix)
    content = bytearray(idx_path.read_bytes())
    struct.pack_into(format, content, place, value)
    idx_path.write_bytes(content)
    with pytest.raises(UserError, match=r"small\.(idx|bin) .*ponder preprocess"):
        IndexedDataset(prefix).document_lengths  # noqa: B018


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_a_missing_file_is_named(prefix, suffix):
    (prefix.parent / f"small{suffix}").unlink()
    with pytest.raises(UserError, match=rf"small\{suffix} does not exist"):
        IndexedDataset(prefix)


@pytest.mark.parametrize("documents", [[], [[], []]])
def test_an_empty_dataset_is_neither_written_nor_read(tmp_path, documents):
    with pytest.raises(UserError, match="no tokens"):
        write(tmp_path / "empty", documents)
    assert list(tmp_path.iterdir()) == []
    bin_path, idx_path = dataset_paths(tmp_path / "empty")
    bin_path.write_bytes(b"")
    idx_path.write_bytes(
        HEADER.pack(b"MMIDIDX\0\0", 1, 8, len(documents), len(documents) + 1)
        + bytes(12 * len(documents))
        + np.arange(len(documents) + 1, dtype="<i8").tobytes()
    )
    with pytest.raises(UserError, match="holds no"):
        IndexedDataset(tmp_path / "empty")


def test_a_failed_write_leaves_the_older_dataset(prefix):
    before = [path.read_bytes() for path in dataset_paths(prefix)]

    def interrupted():
        yield [9] * 100_000
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(prefix, interrupted())
    assert [path.read_bytes() for path in dataset_paths(prefix)] == before
    assert len(list(prefix.parent.iterdir())) == 2


def test_a_new_dataset_replaces_the_older_one(prefix):
    write(prefix, [[7, 8]])
    assert IndexedDataset(prefix).read(0).tolist() == [7, 8]


@pytest.mark.parametrize(("dtype", "token"), [("<u2", 65536), ("<u2", -1), ("<i4", 1 << 31)])
def test_a_token_that_does_not_fit_is_refused(tmp_path, dtype, token):
    with pytest.raises(UserError, match="do not fit"):
        write(tmp_path / "data", [[1], [0, token]], dtype)
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_becomes_shorter_while_it_is_open_is_named(prefix):
    dataset = IndexedDataset(prefix)
    want = dataset.read_document(0).tolist()
    os.truncate(f"{prefix}.bin", 2 * len(want))
    assert dataset.read_document(0).tolist() == want
    with pytest.raises(UserError, match=r"\.bin has become shorter since it was opened; put the whole file back"):
        dataset.read_document(dataset.num_documents - 1)
