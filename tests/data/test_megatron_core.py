"""Datasets go both ways between this package and megatron-core, byte for byte."""

import importlib
import struct

import numpy as np
import pytest
import torch

from megatron_ponder.data.dataset_writer import IndexedDatasetWriter
from megatron_ponder.data.indexed_dataset import IndexedDataset, dataset_paths
from megatron_ponder.data.preprocessing import preprocess
from megatron_ponder.data.tokenizer import load_tokenizer

DTYPES = [np.dtype("<u2"), np.dtype("<i4")]


@pytest.fixture(scope="module")
def megatron():
    return importlib.import_module("megatron.core.datasets.indexed_dataset")


def documents_of(dtype):
    generator = np.random.default_rng(5)
    top = 65_499 if dtype.itemsize == 2 else 1 << 20
    return [generator.integers(0, top, size) for size in (3, 1, 0, 1000, 2, 0, 77)]


def write(prefix, documents, dtype):
    with IndexedDatasetWriter(prefix, dtype) as writer:
        for document in documents:
            writer.add_document(document)


def write_with(megatron, prefix, documents, dtype):
    builder = megatron.IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype.type)
    for document in documents:
        builder.add_document(torch.from_numpy(document), [len(document)])
    builder.finalize(f"{prefix}.idx")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_both_write_the_same_and_read_each_other(megatron, tmp_path, dtype):
    documents = documents_of(dtype)
    write(tmp_path / "ours", documents, dtype)
    write_with(megatron, tmp_path / "theirs", documents, dtype)
    for ours, theirs in zip(dataset_paths(tmp_path / "ours"), dataset_paths(tmp_path / "theirs"), strict=True):
        assert ours.read_bytes() == theirs.read_bytes()
    read_there = megatron.IndexedDataset(str(tmp_path / "ours"))
    read_here = IndexedDataset(tmp_path / "theirs")
    assert read_there.index.dtype == read_here.dtype == dtype
    assert len(read_there) == len(read_here) == len(documents)
    for number, document in enumerate(documents):
        np.testing.assert_array_equal(read_there[number], document)
        np.testing.assert_array_equal(read_here.read_document(number), document)


@pytest.mark.slow
def test_documents_of_several_sequences(megatron, tmp_path):
    builder = megatron.IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=np.uint16)
    builder.add_document(torch.arange(5), [2, 3])
    builder.add_document(torch.arange(5, 6), [1])
    builder.finalize(str(tmp_path / "theirs.idx"))
    dataset = IndexedDataset(tmp_path / "theirs")
    assert [dataset.read_document(number).tolist() for number in range(2)] == [[0, 1, 2, 3, 4], [5]]
    with IndexedDatasetWriter(tmp_path / "copy", dataset.dtype) as writer:
        writer.append_dataset(dataset)
    for copy, theirs in zip(dataset_paths(tmp_path / "copy"), dataset_paths(tmp_path / "theirs"), strict=True):
        assert copy.read_bytes() == theirs.read_bytes()


@pytest.mark.slow
def test_a_preprocessed_corpus_is_what_their_builder_makes_of_it(megatron, source_files, tokenizer_path, tmp_path):
    tokenizer = load_tokenizer(tokenizer_path)
    report = preprocess(source_files[:10], tmp_path / "ours", tokenizer_path, shard_bytes=30_000)
    texts = [path.read_bytes().decode() for path in source_files[:10]]
    documents = [np.array([*tokenizer.encode(text), tokenizer.eod_id]) for text in texts if text]
    write_with(megatron, tmp_path / "theirs", documents, np.dtype("<u2"))
    for ours, theirs in zip(dataset_paths(report.prefix), dataset_paths(tmp_path / "theirs"), strict=True):
        assert ours.read_bytes() == theirs.read_bytes()


@pytest.mark.parametrize(("dtype", "code", "letter"), [("<u2", 8, "H"), ("<i4", 4, "i")])
def test_bytes_derived_by_hand(tmp_path, dtype, code, letter):
    """The format without the package: two documents of 2 and 1 tokens, with an empty one between."""
    size = struct.calcsize(letter)
    write(tmp_path / "data", [[7, 65_499], [], [1]], np.dtype(dtype))
    bin_path, idx_path = dataset_paths(tmp_path / "data")
    assert bin_path.read_bytes() == struct.pack(f"<3{letter}", 7, 65_499, 1)
    assert idx_path.read_bytes() == (
        bytes.fromhex("4d4d49444944580000")
        + bytes.fromhex("0100000000000000")
        + bytes([code])
        + bytes.fromhex("0300000000000000 0400000000000000")
        + bytes.fromhex("02000000 00000000 01000000")
        + struct.pack("<3q", 0, 2 * size, 2 * size)
        + struct.pack("<4q", 0, 1, 2, 3)
    )
