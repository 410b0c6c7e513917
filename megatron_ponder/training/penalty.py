"""The weight λ of latent steps in the loss: scheduled, and steered towards a number of steps if one is wanted.

What it weighs is the mean number of steps of a token, or how far the mean over the batch is from a prior.
"""

import math
from collections.abc import Sequence

from megatron_ponder.checkpoint.run_state import RunState
from megatron_ponder.config import Config
from megatron_ponder.model.tally import Tally
from megatron_ponder.training.objective import PenaltyWeights

LARGEST_FACTOR = 1e6
# While λ is steered it goes with this power of mean K̂; no K̂ counts as less than this share of K.
DAMPING, LEAST = 2, 0.01
# No share of tokens counts as less, whose logarithm would not be finite.
LEAST_SHARE = 1e-6


class Penalty:
    """λ from step to step.

    Without `target_latent_steps` it is the schedule: 0 until `penalty_start`, linear up to `penalty_end`, full from
    there. With it, the schedule is multiplied by a factor that follows a controller from `penalty_end` on, or from the
    step in which the router first decides if that is later, because before it λ moves nothing. Every optimiser step
    log(factor) grows by

        target_rate · (mean K̂ − target) + DAMPING · (growth of log mean K̂ since the step before).

    The first term alone would swing: λ moves the router's weights and they move K̂, which goes on falling when it has
    passed the target; and a router whose tokens take no step at all learns nothing that would bring one back. By the
    second, λ falls with K̂ at once. On a logarithmic scale no λ that suits the task has to be known beforehand, and λ
    stays positive.

    With a prior p of the mean s̄ of s over the global batch, λ weighs KL(s̄ ‖ p) = Σ_k s̄_k log(s̄_k / p_k). Its gradient
    is that of Σ_k c_k s̄_k, a sum over tokens, with c_k = log(s̄_k / p_k), which needs s̄ of all micro-batches before the
    first one goes backward. It is taken from the optimiser step before, in which s was summed over all ranks: no rank
    waits for another, and nothing depends on how a batch is divided. The first step of the router has no penalty.
    """

    def __init__(self, config: Config, state: RunState) -> None:
        """Prepare.

        Args:
            config: resolved.
            state: of the run, where what steering has to remember is kept.
        """
        self._config, self._least = config.ponder_training, LEAST * config.ponder.latent_steps
        self._prior = config.ponder_training.prior(config.ponder.latent_steps)
        self._state = state

    def weight(self, step: int) -> float:
        """λ of the optimiser step after `step` of them."""
        config = self._config
        unknown = self._prior is not None and self._state.penalty_shares is None
        if step < config.penalty_start or unknown:
            return 0.0
        full = config.penalty_weight * self._state.penalty_factor
        if step >= config.penalty_end:
            return full
        return full * (step - config.penalty_start) / (config.penalty_end - config.penalty_start)

    def weights(self, step: int) -> PenaltyWeights:
        """What the loss of that step needs: λ, or with a prior λ c."""
        full, shares = self.weight(step), self._state.penalty_shares
        if self._prior is None or shares is None:
            return full
        return tuple(full * ratio for ratio in _log_ratios(shares, self._prior))

    def of(self, tally: Tally) -> float:
        """What λ weighs of a step: the mean over tokens of Σ_{k ≥ 1} w_k, or KL(s̄ ‖ p) where a router decides."""
        if self._prior is None or not any(tally.weights):
            return tally.penalty / tally.tokens
        return divergence(tally.mean_shares, self._prior)

    def observe(self, step: int, mean_steps: float, shares: Sequence[float] = ()) -> None:
        """Steer.

        Args:
            step: as given to `weight`.
            mean_steps: average K̂ of the tokens of that step, over all ranks.
            shares: mean of s over these tokens.
        """
        config = self._config
        if self._prior is not None and step >= config.router_decides:
            self._state.penalty_shares = list(shares)
        if config.target_latent_steps is None or step < max(config.penalty_end, config.router_decides):
            return
        now = max(mean_steps, self._least)
        before = now if self._state.penalty_steps is None else self._state.penalty_steps
        growth = config.target_rate * (mean_steps - config.target_latent_steps) + DAMPING * math.log(now / before)
        factor = self._state.penalty_factor * math.exp(growth)
        self._state.penalty_factor = min(max(factor, 1 / LARGEST_FACTOR), LARGEST_FACTOR)
        self._state.penalty_steps = now


def divergence(shares: Sequence[float], prior: Sequence[float]) -> float:
    """KL(s̄ ‖ p) in nats, of the mean of s over a batch from the prior."""
    ratios = _log_ratios(shares, prior)
    return sum(share * ratio for share, ratio in zip(shares, ratios, strict=True))


def _log_ratios(shares: Sequence[float], prior: Sequence[float]) -> tuple[float, ...]:
    return tuple(math.log(max(share, LEAST_SHARE) / wanted) for share, wanted in zip(shares, prior, strict=True))
