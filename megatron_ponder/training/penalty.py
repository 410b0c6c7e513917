"""The weight λ of additional steps in the loss: scheduled, and steered towards a number of steps if one is wanted."""

import math

from megatron_ponder.config import PonderConfig

LARGEST_FACTOR = 1e3


class Penalty:
    """λ from step to step.

    Without `ponder.target_steps` it is the schedule: 0 until `penalty_start`, linear up to `penalty_end`, full from
    there. With it, the schedule is multiplied by a factor that follows an integral controller from `penalty_end` on,
    or from `router_start` if that is later, because before it λ moves nothing: every step log(factor) grows by
    `target_rate` times what mean K̂ at τ exceeds the target by. On a logarithmic scale no λ that suits the task has to
    be known beforehand, and λ stays positive.

    Attributes:
        factor: what the schedule is multiplied by; all there is to save.
    """

    def __init__(self, config: PonderConfig, factor: float = 1.0) -> None:
        """Prepare.

        Args:
            config: of the model.
            factor: as it was when the run that goes on was saved.
        """
        self._config = config
        self.factor = factor

    def weight(self, step: int) -> float:
        """λ of the optimiser step after `step` of them."""
        config = self._config
        if step < config.penalty_start:
            return 0.0
        full = config.penalty_weight * self.factor
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
        if config.target_steps is None or step < max(config.penalty_end, config.router_start):
            return
        factor = self.factor * math.exp(config.target_rate * (mean_steps - config.target_steps))
        self.factor = min(max(factor, 1 / LARGEST_FACTOR), LARGEST_FACTOR)
