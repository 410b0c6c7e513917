"""What a run does about numbers not finite, losses out of line, collapsed routers, and data that cannot be read."""

import math
import statistics
from collections import deque
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from megatron_ponder.base.errors import UserError, describe
from megatron_ponder.config import PonderConfig, TrainingConfig
from megatron_ponder.model.tally import Tally

# Losses that the next one is compared with, and the fewest that say anything.
WINDOW, ENOUGH = 100, 20
# Optimiser steps in which a router may still treat all tokens alike, and the share of tokens that counts as all.
FORMING, ALL = 200, 0.999
# Nats per token that pruning may cost.
COSTLY = 0.01


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


def router_complaint(tally: Tally, cost: float, step: int, ponder: PonderConfig) -> str | None:
    """What is wrong with how a router spreads its tokens over steps, once the penalty has its full weight.

    Args:
        tally: of a validation.
        cost: nats per token that the steps below τ were worth in it.
        step: optimiser steps done.
        ponder: of the model.
    """
    if step < max(ponder.penalty_end, ponder.router_start + FORMING):
        return None
    most, last = max(range(len(tally.steps)), key=tally.steps.__getitem__), ponder.steps
    if cost > COSTLY:
        return (
            f"without the steps whose weight is below ponder.threshold ({ponder.threshold:g}) the loss is {cost:.3f} "
            "nats higher: attention uses small weights too; lower ponder.threshold, or set ponder.prune_start, so that "
            "the last part of training prunes as inference does"
        )
    if tally.steps[most] < ALL * tally.tokens:
        return None
    if most == 0:
        return (
            f"{ALL:.1%} of tokens or more take no additional step: the router has collapsed; lower "
            "ponder.penalty_weight or ponder.threshold, begin with a higher ponder.router_initial_bias, or compare "
            "with fixed mode, which tells whether steps help at all"
        )
    if most == last:
        return (
            f"{ALL:.1%} of tokens or more take all {last} additional steps: nothing is pruned; raise ponder.threshold "
            f"({ponder.threshold:g}) or ponder.penalty_weight ({ponder.penalty_weight:g})"
        )
    return f"{ALL:.1%} of tokens or more take {most} additional steps: the router does not tell tokens apart"


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
