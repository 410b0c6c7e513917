import hashlib
import itertools
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ponder.data import token_streams
from megatron_ponder.data.dataset_writer import IndexedDatasetWriter
from megatron_ponder.data.indexed_dataset import IndexedDataset
from megatron_ponder.data.token_streams import END, LENGTH, TokenStreams, blocks_of_array, blocks_of_file


def paths(folder):
    return folder / "tokens", folder / "lengths", folder / "ends"


def contents(folder):
    tokens, lengths, ends = paths(folder)
    return (
        np.fromfile(tokens, "<u2").tolist(),
        np.fromfile(lengths, LENGTH).tolist(),
        np.fromfile(ends, END).tolist(),
    )


@settings(max_examples=100)
@given(
    lengths=st.lists(st.integers(0, 12), max_size=12),
    cuts=st.lists(st.integers(0, 60), max_size=8),
    longest=st.integers(1, 13),
)
def test_pieces_and_long_documents(tmp_path_factory, lengths, cuts, longest):
    """However documents come in pieces, the files are the same, and only too long documents are several sequences."""
    folder = tmp_path_factory.mktemp("streams")
    tokens = np.arange(sum(lengths), dtype="<u2")
    bounds = [0, *np.cumsum(lengths).tolist()]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(token_streams, "LONGEST_SEQUENCE", longest)
        streams = TokenStreams(*paths(folder), np.dtype("<u2"))
        for start, stop in itertools.pairwise(bounds):
            inner = sorted({cut for cut in cuts if start < cut < stop})
            for left, right in zip([start, *inner], [*inner, stop], strict=True):
                streams.add(tokens[left:right], np.array([right - left]), unfinished=right < stop)
        streams.close()
    expected_lengths, expected_ends = [], []
    for length in lengths:
        while length > longest:
            expected_lengths.append(longest)
            length -= longest
        expected_lengths.append(length)
        expected_ends.append(len(expected_lengths))
    assert contents(folder) == (tokens.tolist(), expected_lengths, expected_ends)
    assert (streams.num_tokens, streams.num_documents) == (sum(lengths), len(lengths))
    assert streams.digest.digest() == hashlib.sha256(tokens.tobytes()).digest()


def test_several_documents_at_once(tmp_path):
    streams = TokenStreams(*paths(tmp_path), np.dtype("<u2"))
    streams.add(np.arange(5, dtype="<u2"), np.array([2, 0, 3]), unfinished=True)
    streams.add(np.arange(5, 7, dtype="<u2"), np.array([1, 1]))
    streams.add(np.array([], "<u2"), np.array([], np.int64))
    streams.close()
    assert contents(tmp_path) == (list(range(7)), [2, 0, 4, 1], [1, 2, 3, 4])


def test_streams_are_joined(tmp_path, monkeypatch):
    monkeypatch.setattr(token_streams, "BLOCK_ENTRIES", 2)
    monkeypatch.setattr(token_streams, "BLOCK_BYTES", 6)
    for name in ("one", "both"):
        (tmp_path / name).mkdir()
    one = TokenStreams(*paths(tmp_path / "one"), np.dtype("<u2"))
    one.add(np.arange(9, dtype="<u2"), np.array([2, 0, 3, 0, 4]))
    one.close()
    both = TokenStreams(*paths(tmp_path / "both"), np.dtype("<u2"))
    tokens, lengths, ends = paths(tmp_path / "one")
    for _ in range(2):
        digest = both.append(tokens, blocks_of_file(lengths, LENGTH), blocks_of_array(np.fromfile(ends, END)))
        assert digest == one.digest.hexdigest()
    both.close()
    assert contents(tmp_path / "both") == ([*range(9), *range(9)], [2, 0, 3, 0, 4] * 2, list(range(1, 11)))


def test_memory_does_not_grow_with_the_documents(tmp_path):
    def peak(documents):
        with IndexedDatasetWriter(tmp_path / "data", np.dtype("<u2")) as writer:
            tracemalloc.start()
            for _ in range(0, documents, 1000):
                writer.streams.add(np.ones(1000, "<u2"), np.ones(1000, np.int64))
            writer._finish()  # what follows the block, while it is being measured
            used = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            writer._finish = lambda: None
        return used

    small, large = peak(1_000_000), peak(4_000_000)
    assert IndexedDataset(tmp_path / "data").num_documents == 4_000_000
    assert large < small + (1 << 20)
    assert large < 16 << 20
