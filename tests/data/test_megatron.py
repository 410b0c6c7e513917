"""The sample index beside that of megatron-core's compiled helper, byte for byte."""

import importlib.util
import sysconfig
from pathlib import Path

import numpy as np
import pytest

from megatron_ponder.data.indexed_dataset import IndexedDataset
from megatron_ponder.data.preprocessing import preprocess
from megatron_ponder.data.sample_index import SampleIndex, sample_beginnings


@pytest.fixture(scope="module")
def helpers():
    """megatron-core's compiled module alone, because importing the package takes half a minute."""
    folder = Path(sysconfig.get_paths()["platlib"]) / "megatron" / "core" / "datasets"
    path = folder / f"helpers_cpp{sysconfig.get_config_var('EXT_SUFFIX')}"
    spec = importlib.util.spec_from_file_location("helpers_cpp", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def assert_same(helpers, lengths, order, sequence_length, epochs=1):
    """`epochs` only tells the helper how the tokens of `order` are counted."""
    tokens = int(lengths[order].sum(dtype=np.int64))
    build = helpers.build_sample_idx_int32
    theirs = build(lengths, order, sequence_length, epochs, tokens // epochs, True, 1)
    ours = sample_beginnings(lengths, order, sequence_length, tokens)
    assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
    assert ours.tobytes() == theirs.tobytes()
    theirs = helpers.build_sample_idx_int64(lengths, order, sequence_length, epochs, tokens // epochs, True, 1)
    np.testing.assert_array_equal(ours, theirs)
    return ours


@pytest.mark.parametrize("seed", range(40))
def test_random_documents(helpers, seed):
    random = np.random.default_rng(seed)
    count = int(random.integers(1, 3000))
    lengths = random.integers(0, random.choice([2, 5, 300]), count).astype(np.int32)
    lengths[random.integers(count)] += 20
    if seed % 4 == 0:
        lengths[random.integers(count)] = 1_000_000
    epochs = int(random.integers(1, 4))
    order = np.concatenate([random.permutation(count) for _ in range(epochs)]).astype(np.int32)
    sequence_length = int(random.integers(1, 20 if seed % 2 else 3000))
    if lengths[order].sum(dtype=np.int64) > sequence_length:
        assert_same(helpers, lengths, order, sequence_length, epochs)


def test_a_million_documents(helpers):
    random = np.random.default_rng(0)
    lengths = random.exponential(1000, 1_000_000).astype(np.int32)
    rows = assert_same(helpers, lengths, random.permutation(len(lengths)).astype(np.int32), 2048)
    assert len(rows) > 400_000


@pytest.mark.parametrize("sequence_length", [16, 128, 2048])
def test_a_real_dataset_in_our_own_order(helpers, source_files, tokenizer_path, tmp_path, sequence_length):
    prefix = preprocess(source_files, tmp_path / "data", tokenizer_path).prefix
    dataset = IndexedDataset(prefix)
    index = SampleIndex(dataset.document_lengths, sequence_length, seed=5)
    for number in (0, 1):
        epoch = index._epoch(number)
        assert_same(helpers, dataset.sequence_lengths, epoch.documents, sequence_length)
        theirs = helpers.build_sample_idx_int32(
            dataset.sequence_lengths, epoch.documents, sequence_length, 1, dataset.num_tokens, True, 1
        )
        assert epoch.beginnings.tobytes() == theirs.tobytes()
