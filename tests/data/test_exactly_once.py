"""A run that is interrupted and goes on with other ranks and micro-batches reads what it would have read."""

from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_ponder.config import BlendPart, DataConfig, PhaseConfig
from megatron_ponder.data.dataset import Share
from megatron_ponder.data.dataset_writer import IndexedDatasetWriter
from megatron_ponder.data.loader import batches
from megatron_ponder.data.mixture import open_mixture

GLOBAL_BATCH = 16
# Steps until the next interruption, data-parallel size, micro-batch, loader processes on each rank.
LEGS = [(4, 1, 4, 2), (3, 2, 8, 1), (5, 4, 2, 2), (6, 1, 16, 1)]
SEQUENCE_LENGTH = 9


def write(prefix: Path, first_token: int, documents: int, seed: int) -> int:
    """Documents of 0 to 39 tokens, which are numbered through; returns how many tokens."""
    random = np.random.default_rng(seed)
    with IndexedDatasetWriter(prefix, np.dtype("<u2")) as writer:
        for length in random.integers(0, 40, documents):
            begun = first_token + writer.num_tokens
            writer.add_document(np.arange(begun, begun + length))
        return writer.num_tokens


def in_legs(data: DataConfig) -> torch.Tensor:
    """(samples, S + 1) as all ranks together read them, each leg opening the data anew."""
    consumed, steps = 0, []
    for count, ranks, micro_batch, workers in LEGS:
        dataset = open_mixture(data, seed=11).samples["train"]
        dataset.prepare(consumed)
        readers = [
            batches(dataset, consumed, GLOBAL_BATCH, micro_batch, rank, ranks, num_workers=workers)
            for rank in range(ranks)
        ]
        for _ in range(count):
            read = [next(reader) for reader in readers]
            assert all(len(batch) == micro_batch for micro_batches in read for batch in micro_batches)
            steps += [batch for micro_batches in read for batch in micro_batches]
            consumed += GLOBAL_BATCH
    return torch.cat(steps)


def uninterrupted(data: DataConfig) -> torch.Tensor:
    dataset = open_mixture(data, seed=11).samples["train"]
    steps = sum(count for count, *_ in LEGS)
    return torch.cat([torch.cat(step) for step in islice(batches(dataset, 0, GLOBAL_BATCH, 1, 0, 1), steps)])


@pytest.mark.parametrize("cached", [False, True])
def test_two_epochs_of_one_dataset(tmp_path, cached):
    tokens = write(tmp_path / "data", 0, documents=60, seed=0)
    data = DataConfig(
        str(tmp_path / "data"),
        split="1",
        sequence_length=SEQUENCE_LENGTH,
        cache_path=str(tmp_path / "cache") if cached else None,
    )
    read = in_legs(data)
    torch.testing.assert_close(read, uninterrupted(data), rtol=0, atol=0)

    samples = (tokens - 1) // SEQUENCE_LENGTH
    assert len(read) >= 2 * samples
    orders = [read[samples * epoch : samples * (epoch + 1)] for epoch in (0, 1)]
    for order in orders:
        inputs = Counter(order[:, :-1].flatten().tolist())
        assert set(inputs.values()) == {1} and len(inputs) == samples * SEQUENCE_LENGTH
    assert not torch.equal(*orders)


@pytest.mark.parametrize("ranks", [1, 3, 9])
def test_shares_of_a_sample_overlap_in_the_token_that_the_first_predicts(tmp_path, ranks):
    write(tmp_path / "data", 0, documents=20, seed=0)
    data = DataConfig(str(tmp_path / "data"), split="1", sequence_length=SEQUENCE_LENGTH)
    dataset = open_mixture(data, seed=11).samples["train"]
    (whole,) = next(batches(dataset, 0, 8, 8, 0, 1))
    read, read_document = [], dataset.indexed.read_document
    dataset.indexed.read_document = lambda *where: read.append(where[2]) or read_document(*where)
    length = SEQUENCE_LENGTH // ranks
    for place in range(ranks):
        read.clear()
        (share,) = next(batches(dataset, 0, 8, 8, 0, 1, share=Share(place, ranks)))
        assert torch.equal(share, whole[:, place * length :][:, : length + 1])
        assert sum(read) == share.numel()


def test_a_blend_with_a_phase(tmp_path):
    sizes, begun = {}, 0
    for number, (name, documents) in enumerate({"large": 80, "small": 12, "later": 30}.items()):
        sizes[name] = write(tmp_path / name, begun, documents, seed=number)
        begun += sizes[name]
    first = [BlendPart(str(tmp_path / "large"), 0.6), BlendPart(str(tmp_path / "small"), 0.4)]
    second = [BlendPart(str(tmp_path / "later"), 3), BlendPart(str(tmp_path / "small"), 1)]
    data = DataConfig(
        first,
        phases=[PhaseConfig(150, second)],
        split="1",
        sequence_length=SEQUENCE_LENGTH,
        cache_path=str(tmp_path / "cache"),
    )
    read = in_legs(data)
    torch.testing.assert_close(read, uninterrupted(data), rtol=0, atol=0)

    # Each dataset's samples are its own stream, from the beginning and without a gap, whatever the phase.
    bounds = np.cumsum([0, *sizes.values()])
    for name, low, high in zip(sizes, bounds[:-1], bounds[1:], strict=True):
        own = read[(read[:, 0] >= int(low)) & (read[:, 0] < int(high))]
        assert len(own) > 30
        alone = open_mixture(DataConfig(str(tmp_path / name), split="1", sequence_length=SEQUENCE_LENGTH), seed=11)
        expected = np.stack([alone.samples["train"][position] for position in range(len(own))])
        np.testing.assert_array_equal(own.numpy(), expected)
