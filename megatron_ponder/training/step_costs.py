"""What steps cost, which changes when latent steps begin, and how many are left at what the last one cost."""

from megatron_ponder.config import Config
from megatron_ponder.estimates.flops import training_flops
from megatron_ponder.model.modes import passes_of
from megatron_ponder.training.schedules import StepPlan


class StepCosts:
    """Model FLOPs of the steps of a run, over all ranks."""

    def __init__(self, config: Config) -> None:
        """Count.

        Args:
            config: resolved, with a vocabulary size.
        """
        training = config.ponder_training
        self._passes, self._steps = passes_of(config.ponder), config.training.steps
        self._begin = training.latent_start if self._passes.steps else 0
        self._plain = training_flops(config, 0, latents=False)
        self._pondering = {r: training_flops(config, r) for r in training.refinement_choices}
        drawn = training.refinement_draws
        self._ratio = sum(self._pondering[r] for r in drawn) / len(drawn) / self._plain

    def flops(self, plan: StepPlan) -> float:
        """Model FLOPs of a step."""
        return self._pondering[plan.refinements] if plan.rule.latents else self._plain

    def slots(self, plan: StepPlan) -> int:
        """Slots a token that all passes of a step run together."""
        return sum(self._passes.plan(plan.refinements, plan.rule.latents))

    def left(self, step: int) -> float:
        """How many steps at the cost of the last one the rest of the run is worth, after `step` of them."""
        plain = max(0, min(self._begin, self._steps) - step)
        return plain + (self._steps - step - plain) * (self._ratio if step <= self._begin else 1.0)

    def change(self, step: int) -> str | None:
        """What is to be said of the cost of the step after `step` of them, where it is not that of the one before."""
        if step != self._begin or step == 0:
            return None
        return f"latent steps begin: from here a step takes {self._ratio:.1f} times as many operations"
