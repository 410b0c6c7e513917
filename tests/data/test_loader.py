import multiprocessing
import os
import re
import signal
from itertools import islice

import numpy as np
import pytest
import torch

from megatron_ponder.base.errors import UserError
from megatron_ponder.config import DataConfig
from megatron_ponder.data.dataset import TokenDataset
from megatron_ponder.data.dataset_writer import IndexedDatasetWriter
from megatron_ponder.data.loader import batches, validation_batches
from megatron_ponder.data.mixture import open_mixture


@pytest.fixture
def dataset(tmp_path) -> TokenDataset:
    """14 samples an epoch."""
    with IndexedDatasetWriter(tmp_path / "data", np.dtype("<u2")) as writer:
        for length in (20, 7, 0, 30, 1, 29):
            writer.add_document(np.arange(writer.num_tokens, writer.num_tokens + length))
    return open_mixture(DataConfig(str(tmp_path / "data"), split="1", sequence_length=6), seed=0).samples["train"]


def expected(dataset, positions):
    return torch.from_numpy(np.stack([dataset[position] for position in positions]))


@pytest.mark.parametrize(("micro_batch_size", "data_size"), [(1, 1), (8, 1), (2, 2), (4, 2), (1, 4), (1, 8)])
def test_ranks_together_read_the_next_positions(dataset, micro_batch_size, data_size):
    ranks = [batches(dataset, 3, 8, micro_batch_size, data_rank=rank, data_size=data_size) for rank in range(data_size)]
    for step in range(4):
        micro_batches = [batch for rank in ranks for batch in next(rank)]
        assert len(micro_batches) == 8 // micro_batch_size
        assert all(batch.shape == (micro_batch_size, 7) and batch.dtype == torch.int64 for batch in micro_batches)
        torch.testing.assert_close(
            torch.cat(micro_batches), expected(dataset, range(3 + 8 * step, 11 + 8 * step)), rtol=0, atol=0
        )


@pytest.mark.parametrize("data_size", [1, 2])
def test_ranks_together_read_batches_that_grow(dataset, data_size):
    ranks = [batches(dataset, 1, lambda before: 2 + 2 * (before > 4), 1, rank, data_size) for rank in range(data_size)]
    for first, stop in ((1, 3), (3, 5), (5, 9), (9, 13)):
        micro_batches = [batch for rank in ranks for batch in next(rank)]
        torch.testing.assert_close(torch.cat(micro_batches), expected(dataset, range(first, stop)), rtol=0, atol=0)


def test_workers_change_neither_order_nor_the_global_generator(dataset):
    state = torch.get_rng_state()
    plain = list(islice(batches(dataset, 0, 4, 2, 0, 1), 6))
    worked = list(islice(batches(dataset, 0, 4, 2, 0, 1, num_workers=2), 6))
    assert torch.equal(torch.get_rng_state(), state)
    for step, other in zip(plain, worked, strict=True):
        for batch, same in zip(step, other, strict=True):
            torch.testing.assert_close(batch, same, rtol=0, atol=0)


def test_a_resumed_run_goes_on_where_the_first_stopped(dataset):
    whole = [torch.cat(step) for step in islice(batches(dataset, 0, 4, 2, 0, 1), 6)]
    resumed = [torch.cat(step) for step in islice(batches(dataset, 12, 4, 4, 0, 1), 3)]
    for step, same in zip(whole[3:], resumed, strict=True):
        torch.testing.assert_close(step, same, rtol=0, atol=0)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_samples_with_ids_that_the_model_does_not_know_are_named(dataset, num_workers):
    """Whatever a manifest says: the file itself may be damaged, or be another by now."""
    tokens = torch.cat([torch.cat(step) for step in islice(batches(dataset, 0, 2, 2, 0, 1), 7)])
    bad = [position for position, sample in enumerate(tokens) if sample.max() >= 60]
    assert 1 < len(bad) < 14
    loader = batches(dataset, 0, 14, 14, 0, 1, num_workers=num_workers, vocab_size=60)
    place = dataset.describe(bad[0])
    assert re.fullmatch(rf"document \d( and \d more)? of {dataset.indexed.prefix}", place)
    message = (
        f"sample {bad[0]} ({place}) has the token id {tokens[bad[0]].max()}, and the model knows 0 to 59; so have "
        f"samples {', '.join(map(str, bad[1:]))}: the dataset is damaged"
    )
    with pytest.raises(UserError, match=re.escape(message)):
        next(loader)
    next(batches(dataset, 0, 14, 14, 0, 1, vocab_size=87))
    with pytest.raises(UserError, match=rf"^sample {bad[0]} \(.*, and the model knows 0 to 59: the dataset is damaged"):
        list(validation_batches(dataset, 14, 1, 0, 1, vocab_size=60))


def test_negative_ids_are_named(tmp_path):
    with IndexedDatasetWriter(tmp_path / "data", np.dtype("<i4")) as writer:
        writer.add_document([1, 2, -3, 4, 5])
    samples = open_mixture(DataConfig(str(tmp_path / "data"), split="1", sequence_length=4), seed=0).samples["train"]
    with pytest.raises(UserError, match="has the token id -3, and the model knows 0 to 9"):
        next(batches(samples, 0, 1, 1, 0, 1, vocab_size=10))


class ReportsItsProcess:
    """Not tokens but the settings of the process that loads them."""

    def read(self, position, share):
        denormal = torch.tensor(1e-40) * 1
        return np.array([torch.get_num_threads(), int(denormal == 0)])


def test_workers_use_one_thread_and_flush_denormals():
    (settings,) = next(batches(ReportsItsProcess(), 0, 2, 2, 0, 1, num_workers=1))
    assert settings.tolist() == [[1, 1], [1, 1]]


class Fails:
    """Samples of which those from some position on cannot be read, by a fault that nobody has thought of."""

    def __init__(self, fault, first: int = 3) -> None:
        self._fault, self._first = fault, first

    def read(self, position, share):
        if position >= self._first:
            self._fault()
        return np.arange(3)


def no_such_key() -> None:
    raise KeyError("colour")


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (no_such_key, r"^reading samples 2 to 3 has failed: KeyError: 'colour'\nTraceback (.|\n)*, in no_such_key\n"),
        (die, "^reading ahead has failed: DataLoader worker"),
    ],
)
def test_processes_end_whatever_goes_wrong_in_one_of_them(fault, said):
    """Also while somebody holds the traceback; the exit of this process would wait for them for ever."""
    before = set(multiprocessing.active_children())
    loader = batches(Fails(fault), 0, 2, 2, 0, 1, num_workers=2)
    with pytest.raises(RuntimeError, match=said) as caught:
        list(islice(loader, 9))
    assert caught.tb
    assert set(multiprocessing.active_children()) <= before


def test_what_goes_wrong_without_processes_is_said_as_well():
    with pytest.raises(RuntimeError, match=r"^reading samples 2 to 3 has failed: KeyError: .colour"):
        list(islice(batches(Fails(no_such_key), 0, 2, 2, 0, 1), 9))


@pytest.mark.parametrize("samples", [0, 1, 2, 7, 12, 30])
@pytest.mark.parametrize(("micro_batch_size", "data_size"), [(1, 1), (4, 1), (3, 2), (2, 3), (5, 5)])
def test_validation_reads_each_position_once(dataset, samples, micro_batch_size, data_size):
    ranks = [list(validation_batches(dataset, samples, micro_batch_size, rank, data_size)) for rank in range(data_size)]
    assert all(len(batch) == micro_batch_size for rank in ranks for batch in rank[:-1])
    assert all(0 < len(batch) <= micro_batch_size for rank in ranks for batch in rank)
    counts = [sum(map(len, rank)) for rank in ranks]
    assert max(counts) - min(counts) <= 1
    flat = [batch for rank in ranks for batch in rank]
    assert sum(counts) == samples
    if samples:
        torch.testing.assert_close(torch.cat(flat), expected(dataset, range(samples)), rtol=0, atol=0)
