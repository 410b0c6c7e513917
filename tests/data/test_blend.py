"""A position alone says which dataset a sample is of and which of its samples it is, through all phases."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_ponder.data import interleave
from megatron_ponder.data.blend import BlendedDataset, Phase


@pytest.fixture(autouse=True, scope="module")
def short_stretches():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interleave, "DRAWS_AT_ONCE", 64)
        yield


class Numbered:
    """Samples that say which they are."""

    def __init__(self, name: int, samples_per_epoch: int = 10):
        self.name = name
        self.samples_per_epoch = samples_per_epoch
        self.prepared = []

    def __getitem__(self, position: int) -> np.ndarray:
        return np.array([self.name, position])

    def describe(self, position: int) -> str:
        return f"{self.name} {position}"

    def prepare(self, position: int) -> None:
        self.prepared.append(position)


def numbered(count: int) -> list[Numbered]:
    return [Numbered(name) for name in range(count)]


@st.composite
def phase_lists(draw):
    firsts = sorted(draw(st.sets(st.integers(1, 150), max_size=3)))
    phases = []
    for first in [0, *firsts]:
        chosen = draw(st.lists(st.integers(0, 4), unique=True, min_size=1, max_size=5))
        weights = draw(
            st.lists(st.sampled_from([1e-7, 0.1, 0.25, 1.0, 3.0]), min_size=len(chosen), max_size=len(chosen))
        )
        phases.append(Phase(first, chosen, weights))
    return phases


@given(phase_lists())
def test_every_dataset_is_read_in_its_own_order_without_a_gap(phases):
    blend = BlendedDataset(numbered(5), phases)
    counts = [0] * 5
    for position in range(220):
        name, at = blend[position].tolist()
        assert at == counts[name]
        assert blend.describe(position) == f"{name} {at}"
        counts[name] += 1
    assert [drawn for _, drawn in blend.streams(220)] == counts


@given(phase_lists(), st.integers(0, 2))
def test_a_phase_does_not_disturb_what_comes_before(phases, kept):
    kept = min(kept, len(phases) - 1)
    whole, part = BlendedDataset(numbered(5), phases), BlendedDataset(numbered(5), phases[: kept + 1])
    stop = phases[kept + 1].first_sample if kept + 1 < len(phases) else 200
    for position in range(stop):
        assert whole.locate(position) == part.locate(position)


@given(phase_lists())
def test_counts_are_near_the_ideal_of_each_phase(phases):
    blend = BlendedDataset(numbered(5), phases)
    for phase, following in zip(phases, [*phases[1:], Phase(220, [], [])], strict=True):
        counts = dict.fromkeys(phase.datasets, 0)
        for n, position in enumerate(range(phase.first_sample, following.first_sample), start=1):
            counts[blend.locate(position)[0]] += 1
            for dataset, weight in zip(phase.datasets, phase.weights, strict=True):
                assert abs(counts[dataset] - n * weight / sum(phase.weights)) < 1 + 1e-9


@given(st.lists(st.tuples(st.integers(1, 30), st.sampled_from([0.1, 0.3, 1.0, 2.0])), min_size=1, max_size=5))
def test_an_epoch_ends_before_anything_is_read_again(given_datasets):
    datasets = [Numbered(name, size) for name, (size, _) in enumerate(given_datasets)]
    weights = [weight for _, weight in given_datasets]
    blend = BlendedDataset(datasets, [Phase(0, range(len(datasets)), weights)])
    samples = blend.samples_per_epoch
    assert samples >= 1
    drawn = [count for _, count in blend.streams(samples)]
    assert all(count <= dataset.samples_per_epoch for dataset, count in zip(datasets, drawn, strict=True))
    # It is no shorter than it must be: some dataset is through, or a draw away from it.
    beyond = [count for _, count in blend.streams(samples + blend._turns[0].period)]
    assert any(count >= dataset.samples_per_epoch for dataset, count in zip(datasets, beyond, strict=True))


def test_only_what_a_phase_reads_is_prepared():
    blend = BlendedDataset(numbered(3), [Phase(0, [0, 1], [3.0, 1.0]), Phase(100, [1, 2], [1.0, 1.0])])
    blend.prepare(120)
    assert [dataset.prepared for dataset in blend.datasets] == [[], [35], [10]]


def test_far_positions_of_few_digits_are_found_at_once():
    blend = BlendedDataset(numbered(2), [Phase(0, [0, 1], [0.7, 0.3]), Phase(10**12, [1], [1.0])])
    assert blend.locate(10**12 - 10)[1] in (7 * 10**11 - 7, 3 * 10**11 - 3)
    assert blend.locate(10**12) == (1, 3 * 10**11)
