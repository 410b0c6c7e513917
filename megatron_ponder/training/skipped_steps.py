"""The steps of a run that were skipped, and how many are too many."""

import math
from collections.abc import Iterable

from megatron_ponder.config import TrainingConfig


class SkippedSteps:
    """The steps of a run that changed nothing, because their loss or gradients were not finite.

    Attributes:
        steps: their numbers, in order.
    """

    def __init__(self, steps: Iterable[int], training: TrainingConfig) -> None:
        """Go on from those that a checkpoint knows of."""
        self.steps = list(steps)
        self._budget, self._window = training.skipped_steps_budget, training.skipped_steps_window

    def note(self, step: int, norm: float) -> bool:
        """Whether a step was skipped, which its gradient norm tells, the same on all ranks."""
        if math.isfinite(norm):
            return False
        self.steps.append(step)
        return True

    def too_many(self, step: int) -> str | None:
        """What to say if there are more of them than the budget allows."""
        recent = sum(skipped > step - self._window for skipped in self.steps)
        if recent <= self._budget:
            return None
        return (
            f"{recent} of the last {min(step, self._window)} steps were skipped, because their loss or gradients were "
            "not finite; lower optimizer.learning_rate, go on from an earlier checkpoint, or raise "
            "training.skipped_steps_budget"
        )
