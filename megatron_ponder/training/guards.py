"""What a run does about numbers that are not finite, losses out of line, and data that cannot be read."""

import math
import statistics
from collections import deque
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from megatron_ponder.config import TrainingConfig
from megatron_ponder.errors import UserError, describe

# Losses that the next one is compared with, and the fewest that say anything.
WINDOW, ENOUGH = 100, 20


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


class LossSpikes:
    """Finds losses far above those before, by a score that the outliers among them do not move."""

    def __init__(self, threshold: float, losses: Iterable[float | None]) -> None:
        """Watch.

        Args:
            threshold: deviations above the median that make a spike; 0 for never.
            losses: of the steps before.
        """
        self._threshold = threshold
        self._losses: deque[float] = deque((loss for loss in losses if loss is not None), maxlen=WINDOW)

    def score(self, loss: float) -> float | None:
        """Standard deviations by which a loss lies above the median of those before, if that makes it a spike.

        The deviation is estimated from the median of the distances to the median, and taken for no less than a
        thousandth of the median.
        """
        before = list(self._losses)
        if not math.isfinite(loss):
            return None
        self._losses.append(loss)
        if not self._threshold or len(before) < ENOUGH:
            return None
        median = statistics.median(before)
        deviation = 1.4826 * statistics.median(abs(other - median) for other in before)
        score = (loss - median) / max(deviation, 1e-3 * abs(median), 1e-12)
        return score if score > self._threshold else None


class CarefulReader:
    """Reads micro-batches; where that fails it gives zeros of their shape, so that other ranks are not left waiting.

    Attributes:
        problem: what went wrong, in one line; None so far.
    """

    def __init__(self, shape: tuple[int, int]) -> None:
        """Prepare.

        Args:
            shape: (B, L + 1) of what stands in for a micro-batch.
        """
        self._shape = shape
        self.problem: str | None = None

    def read(self, source: Iterator[list[Tensor]], count: int) -> list[Tensor]:
        """The next micro-batches of a source; so many of zeros once that has failed."""
        try:
            if self.problem is None:
                return next(source)
        except (UserError, OSError) as error:
            self.problem = describe(error)
        return [torch.zeros(self._shape, dtype=torch.long)] * count
