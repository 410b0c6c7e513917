"""Sums over tokens that a loss is made of, which travel between ranks and are added up."""

import math
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor

# Fields that have a sum for each of the steps 0 to K.
BY_STEP = ("steps", "weights", "own_losses")


class Tally(NamedTuple):
    """Sums over the tokens of micro-batches, which may be added over micro-batches and ranks.

    Attributes:
        cross_entropy: nats.
        penalty: Σ_{k ≥ 1} w_k, without its weight λ.
        entropy: of the distribution s over steps, in nats.
        steps: (K + 1,), tokens by executed latent steps K̂.
        weights: (K + 1,), s_k.
        own_losses: (K + 1,), nats of what h_{t,k} by itself predicts, before it is mixed with other steps.
        first_squared: square of the first of these.
        steps_first: K̂ times the first of these.
        slots: that were run, over all passes.
        slot_work: the same, three times those of passes with a backward pass, as operations are counted.
        pair_work: pairs of a slot and one that it may see, likewise.

    What every step predicts by itself is zero unless it was asked for; `penalty`, `entropy` and `weights` are without a
    router.
    """

    cross_entropy: float
    penalty: float
    entropy: float
    steps: list[int]
    weights: list[float]
    own_losses: list[float]
    first_squared: float
    steps_first: float
    slots: float
    slot_work: float
    pair_work: float

    @property
    def tokens(self) -> int:
        """Tokens counted."""
        return sum(self.steps)

    @property
    def mean_steps(self) -> float:
        """Average executed latent steps per token."""
        return sum(k * count for k, count in enumerate(self.steps)) / self.tokens

    @property
    def mean_shares(self) -> list[float]:
        """Mean of s_k over tokens, for every k."""
        return [weight / self.tokens for weight in self.weights]

    @property
    def mean_loss(self) -> float:
        """Cross-entropy in nats per token."""
        return self.cross_entropy / self.tokens

    @property
    def steps_follow_loss(self) -> float | None:
        """Pearson's correlation over tokens of K̂ with the loss of what h_{t,0} predicts; None if one never varies."""
        mean_first = self.own_losses[0] / self.tokens
        variance_first = self.first_squared / self.tokens - mean_first**2
        variance_steps = sum(k**2 * count for k, count in enumerate(self.steps)) / self.tokens - self.mean_steps**2
        if min(variance_first, variance_steps) < 1e-9:
            return None
        covariance = self.steps_first / self.tokens - self.mean_steps * mean_first
        return covariance / math.sqrt(variance_first * variance_steps)

    @staticmethod
    def width(steps: int) -> int:
        """How many sums there are for K."""
        return sum(_sizes(steps).values())

    @staticmethod
    def pack(steps: int, sums: Mapping[str, Tensor]) -> Tensor:
        """Lay sums out side by side, as they travel between ranks.

        Args:
            steps: K.
            sums: of B sequences by field, (B,), or (B, K + 1) of those in `BY_STEP`; what is not given is zero.

        Returns:
            fp64 (B, width).
        """
        count, device = len(sums["cross_entropy"]), sums["cross_entropy"].device
        packed = torch.zeros(count, Tally.width(steps), dtype=torch.float64, device=device)
        columns = packed.split(list(_sizes(steps).values()), 1)
        for name, column in zip(Tally._fields, columns, strict=True):
            if name in sums:
                column.copy_(sums[name].detach().view_as(column))
        return packed

    @staticmethod
    def of(packed: Tensor) -> "Tally":
        """A tally of packed sums (width,), added over whatever they should cover."""
        single = len(Tally._fields) - len(BY_STEP)
        steps = (len(packed) - single) // len(BY_STEP) - 1
        numbers = iter(packed.tolist())  # of a GPU at once, which is waited for
        sums = {name: list(islice(numbers, size)) for name, size in _sizes(steps).items()}
        sums = {name: own if name in BY_STEP else own[0] for name, own in sums.items()}
        return Tally(**sums | {"steps": [round(count) for count in sums["steps"]]})

    @staticmethod
    def total(tallies: Sequence["Tally"]) -> "Tally":
        """The tally of all that some tallies cover."""
        sums = {name: [getattr(tally, name) for tally in tallies] for name in Tally._fields}
        return Tally(
            **{
                name: [sum(column) for column in zip(*values, strict=True)] if name in BY_STEP else sum(values)
                for name, values in sums.items()
            }
        )


def _sizes(steps: int) -> dict[str, int]:
    """How many sums each field has for K, in the order in which they travel."""
    return {name: steps + 1 if name in BY_STEP else 1 for name in Tally._fields}
