"""Samples of several datasets by turns, by weights that may change in the course of a run."""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from megatron_ponder.data.dataset import Share, TokenDataset
from megatron_ponder.data.interleave import Interleave


class Phase(NamedTuple):
    """A blend that begins at a position.

    Attributes:
        first_sample: the position.
        datasets: numbers of the datasets that it draws from.
        weights: of each of them.
    """

    first_sample: int
    datasets: Sequence[int]
    weights: Sequence[float]


class BlendedDataset:
    """Endless samples of several datasets by turns, see `Interleave`. A position alone says which sample comes.

    Each dataset goes on where it was: the sample that a draw takes from it is the number of draws from it before, in
    this phase and in all earlier ones. A phase therefore changes nothing of what comes before it.

    Args:
        datasets: all that any phase draws from.
        phases: in rising order; the first begins at 0.
    """

    def __init__(self, datasets: Sequence[TokenDataset], phases: Sequence[Phase]) -> None:
        assert phases[0].first_sample == 0
        self.datasets = list(datasets)
        self.phases = list(phases)
        self._turns = [Interleave(phase.weights) for phase in phases]
        # How often each dataset was drawn from before each phase.
        self._before = [[0] * len(datasets)]
        for number, (phase, following) in enumerate(pairwise(phases)):
            assert phase.first_sample < following.first_sample
            self._before.append(self._drawn(number, following.first_sample))

    @property
    def samples_per_epoch(self) -> int:
        """Samples of the first phase before any of its datasets may be read a second time."""
        turns, phase = self._turns[0], self.phases[0]
        return min(
            self.datasets[dataset].samples_per_epoch * turns.period // part
            for dataset, part in zip(phase.datasets, turns.parts, strict=True)
        )

    def locate(self, position: int) -> tuple[int, int]:
        """Which dataset the sample at a position is of, and its position there."""
        number = self._phase(position)
        phase = self.phases[number]
        source, before = self._turns[number].locate(position - phase.first_sample)
        dataset = phase.datasets[source]
        return dataset, self._before[number][dataset] + before

    def streams(self, samples: int) -> list[tuple[TokenDataset, int]]:
        """The datasets, each with how many of the first `samples` samples are of it."""
        return list(zip(self.datasets, self._drawn(self._phase(samples), samples), strict=True))

    def __getitem__(self, position: int) -> np.ndarray:
        """int64 (S + 1,): the sample at a position."""
        dataset, position = self.locate(position)
        return self.datasets[dataset][position]

    def read(self, position: int, share: Share) -> np.ndarray:
        """int64 (S / ranks + 1,): as `TokenDataset.read`."""
        dataset, position = self.locate(position)
        return self.datasets[dataset].read(position, share)

    def describe(self, position: int) -> str:
        """Where the sample at a position is from."""
        dataset, position = self.locate(position)
        return self.datasets[dataset].describe(position)

    def prepare(self, position: int) -> None:
        """Have the order around a position ready before processes that read are started."""
        number = self._phase(position)
        drawn = self._drawn(number, position)
        for dataset in self.phases[number].datasets:
            self.datasets[dataset].prepare(drawn[dataset])

    def _phase(self, position: int) -> int:
        assert position >= 0
        return max(number for number, phase in enumerate(self.phases) if phase.first_sample <= position)

    def _drawn(self, number: int, position: int) -> list[int]:
        phase = self.phases[number]
        drawn = list(self._before[number])
        counts = self._turns[number].counts(position - phase.first_sample)
        for dataset, count in zip(phase.datasets, counts, strict=True):
            drawn[dataset] += count
        return drawn
