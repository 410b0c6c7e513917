"""The weight λ of latent steps in the loss: scheduled, and steered towards a number of steps if one is wanted."""

import math

from megatron_ponder.checkpoint.run_state import RunState
from megatron_ponder.config import Config

LARGEST_FACTOR = 1e6
# While λ is steered it goes with this power of mean K̂; no K̂ counts as less than this share of K.
DAMPING, LEAST = 2, 0.01


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
    """

    def __init__(self, config: Config, state: RunState) -> None:
        """Prepare.

        Args:
            config: resolved.
            state: of the run, where what steering has to remember is kept.
        """
        self._config, self._least = config.ponder_training, LEAST * config.ponder.latent_steps
        self._state = state

    def weight(self, step: int) -> float:
        """λ of the optimiser step after `step` of them."""
        config = self._config
        if step < config.penalty_start:
            return 0.0
        full = config.penalty_weight * self._state.penalty_factor
        if step >= config.penalty_end:
            return full
        return full * (step - config.penalty_start) / (config.penalty_end - config.penalty_start)

    def observe(self, step: int, mean_steps: float) -> None:
        """Steer.

        Args:
            step: as given to `weight`.
            mean_steps: average K̂ of the tokens of that step, over all ranks.
        """
        config = self._config
        if config.target_latent_steps is None or step < max(config.penalty_end, config.router_decides):
            return
        now = max(mean_steps, self._least)
        before = now if self._state.penalty_steps is None else self._state.penalty_steps
        growth = config.target_rate * (mean_steps - config.target_latent_steps) + DAMPING * math.log(now / before)
        factor = self._state.penalty_factor * math.exp(growth)
        self._state.penalty_factor = min(max(factor, 1 / LARGEST_FACTOR), LARGEST_FACTOR)
        self._state.penalty_steps = now
