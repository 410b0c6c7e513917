"""Sums over tokens that a loss is made of, which travel between ranks and are added up."""

import math
from typing import NamedTuple

from torch import Tensor


class Tally(NamedTuple):
    """Sums over the tokens of micro-batches, which may be added over micro-batches and ranks.

    Attributes:
        cross_entropy: nats.
        penalty: Σ_{k ≥ 1} w_k, without its weight λ.
        entropy: of the distribution s over steps, in nats.
        steps: (K + 1,), tokens by executed additional steps K̂.
        weights: (K + 1,), s_k.
        own_losses: (K + 1,), nats of what h_{t,k} by itself predicts, before it is mixed with other steps.
        first_squared: square of the first of these.
        steps_first: K̂ times the first of these.

    The last three are zero unless they were asked for; `penalty`, `entropy` and `weights` are without a router.
    """

    cross_entropy: float
    penalty: float
    entropy: float
    steps: list[int]
    weights: list[float]
    own_losses: list[float]
    first_squared: float
    steps_first: float

    @property
    def tokens(self) -> int:
        """Tokens counted."""
        return sum(self.steps)

    @property
    def mean_steps(self) -> float:
        """Average executed additional steps per token."""
        return sum(k * count for k, count in enumerate(self.steps)) / self.tokens

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
        return 5 + 3 * (steps + 1)

    @staticmethod
    def of(sums: Tensor) -> "Tally":
        """From sums (width,) that `Objective` returns, added over whatever they should cover."""
        values = sums.tolist()
        options = (len(values) - 5) // 3
        steps, weights, own_losses = (values[start : start + options] for start in range(3, len(values) - 2, options))
        return Tally(*values[:3], [round(count) for count in steps], weights, own_losses, *values[-2:])
