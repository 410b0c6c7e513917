"""Losses out of line with those before."""

import math
import statistics
from collections import deque
from collections.abc import Iterable

# Losses that the next one is compared with, and the fewest that say anything.
WINDOW, ENOUGH = 100, 20


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
