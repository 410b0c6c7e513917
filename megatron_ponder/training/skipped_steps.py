"""The steps of a run that were skipped, and how many are too many."""

import math

from megatron_ponder.checkpoint.run_state import RunState
from megatron_ponder.config import TrainingConfig


class SkippedSteps:
    """The steps of a run that changed nothing, because their loss or gradients were not finite."""

    def __init__(self, state: RunState, training: TrainingConfig) -> None:
        """Prepare.

        Args:
            state: of the run, where their numbers are kept.
            training: says how many of how many there may be.
        """
        self._state = state
        self._budget, self._window = training.skipped_steps_budget, training.skipped_steps_window

    def note(self, step: int, norm: float) -> bool:
        """Note a step if it was skipped, and tell whether it was; its gradient norm shows it, alike on all ranks."""
        if math.isfinite(norm):
            return False
        self._state.skipped.append(step)
        return True

    def too_many(self, step: int) -> str | None:
        """The line to say if there are more of them than the budget allows."""
        recent = sum(skipped > step - self._window for skipped in self._state.skipped)
        if recent <= self._budget:
            return None
        return (
            f"{recent} of the last {min(step, self._window)} steps were skipped, because their loss or gradients were "
            "not finite; lower optimizer.learning_rate, go on from an earlier checkpoint, or raise "
            "training.skipped_steps_budget"
        )
