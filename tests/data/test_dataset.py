import os
import pickle

import numpy as np
import pytest

from megatron_ponder.base.errors import UserError
from megatron_ponder.config import DataConfig
from megatron_ponder.data.dataset import TokenDataset
from megatron_ponder.data.dataset_writer import IndexedDatasetWriter
from megatron_ponder.data.indexed_dataset import IndexedDataset
from megatron_ponder.data.mixture import open_mixture


def build(prefix, split, sequence_length, seed):
    return open_mixture(DataConfig(str(prefix), split=split, sequence_length=sequence_length), seed).samples


LENGTHS = [5, 0, 9, 1, 14, 3, 8, 2, 11, 6]


@pytest.fixture
def prefix(tmp_path):
    """Ten documents of 59 tokens, which are numbered through."""
    with IndexedDatasetWriter(tmp_path / "data", np.dtype("<u2")) as writer:
        for length in LENGTHS:
            writer.add_document(np.arange(writer.num_tokens, writer.num_tokens + length))
    return tmp_path / "data"


def test_validation_reads_its_documents_in_order(prefix):
    valid = build(prefix, "5,5", sequence_length=4, seed=0)["valid"]
    first = sum(LENGTHS[:5])
    assert valid.samples_per_epoch == (30 - 1) // 4
    samples = [valid[position] for position in range(valid.samples_per_epoch)]
    assert samples[0].dtype == np.int64
    assert [sample.tolist() for sample in samples] == [
        list(range(first + 4 * j, first + 4 * j + 5)) for j in range(valid.samples_per_epoch)
    ]
    np.testing.assert_array_equal(valid[valid.samples_per_epoch], samples[0])


def test_training_reads_every_token_of_its_documents_once_an_epoch(prefix):
    train = build(prefix, "5,5", sequence_length=4, seed=3)["train"]
    assert train.samples_per_epoch == (29 - 1) // 4
    for epoch in range(3):
        positions = range(epoch * train.samples_per_epoch, (epoch + 1) * train.samples_per_epoch)
        inputs = [token for position in positions for token in train[position][:-1].tolist()]
        assert len(set(inputs)) == len(inputs) == 28
        assert set(inputs) < set(range(29))


def test_documents_stay_whole_within_a_sample(prefix):
    boundaries = set(np.cumsum(LENGTHS))
    train = TokenDataset(IndexedDataset(prefix), range(10), sequence_length=58, seed=0, shuffle=True)
    (jumps,) = np.nonzero(np.diff(train[0]) != 1)
    assert len(jumps) > 3
    assert all(int(train[0][jump]) + 1 in boundaries for jump in jumps)


def test_a_pickled_dataset_gives_the_same_samples(prefix):
    train = build(prefix, "1", sequence_length=4, seed=0)["train"]
    copy = pickle.loads(pickle.dumps(train))
    for position in (0, 5, 100):
        np.testing.assert_array_equal(copy[position], train[position])


def test_a_split_of_weight_zero_is_absent(prefix):
    assert sorted(build(prefix, "9,0,1", 4, 0)) == ["test", "train"]


def test_a_split_without_documents(prefix):
    with pytest.raises(UserError, match=r"leaves no document of .*data, which has 10, for valid; give it a larger"):
        build(prefix, "999,1", 4, 0)


def test_a_split_with_too_few_tokens(prefix):
    with pytest.raises(UserError, match=r"valid part of .*data: sequence longer than the data: 6 .* at most 5"):
        build(prefix, "9,1", 6, 0)


@pytest.mark.parametrize("ending", ["bin", "idx"])
@pytest.mark.parametrize("how", ["written", "longer"])
def test_files_that_somebody_writes_to_are_noticed(prefix, ending, how):
    path = f"{prefix}.{ending}"
    os.utime(path, (1e9, 1e9))
    train = build(prefix, "1", sequence_length=4, seed=0)["train"]
    train[0]
    with open(path, "rb+") as file:
        file.seek(0, os.SEEK_END if how == "longer" else os.SEEK_SET)
        file.write(b"\1\0")
    with pytest.raises(UserError, match=rf"data\.{ending} has been written to since it was opened; put back"):
        train[3]


def test_a_dataset_that_is_replaced_stays_open_as_it_was(prefix):
    train = build(prefix, "1", sequence_length=4, seed=0)["train"]
    before = [train[position].tolist() for position in range(10)]
    with IndexedDatasetWriter(prefix, np.dtype("<u2")) as writer:
        writer.add_document(np.zeros(100, int))
    assert [train[position].tolist() for position in range(10)] == before
