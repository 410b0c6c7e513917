"""Giving up a step that takes long, when somebody asks the run to stop in the middle of it.

Nothing of a run changes before the optimiser's step, so that what a step has computed until then can be dropped. All
ranks have to drop it at the same point, or some would wait for others; they agree without waiting: at each point they
begin to tell each other whether one wants to stop, and hear of it at a later one.
"""

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import Work

from megatron_ponder.base.signals import SIGNALS, StopSignals
from megatron_ponder.parallel.groups import host_group
from megatron_ponder.parallel.mesh import Mesh

# A step that is over within so many seconds is finished, and not given up.
SECONDS_OF_A_LONG_STEP = 5.0


class Abandoned(Exception):  # noqa: N818, it is no error
    """A step has been given up, on every rank.

    Attributes:
        reason: name of the signal.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(f"given up by {reason}")
        self.reason = reason


class Interruption:
    """Points of a step at which it may be given up: before each pass and each micro-batch, forward and backward."""

    def __init__(self, signals: StopSignals, mesh: Mesh) -> None:
        """Prepare; a collective of all ranks.

        Args:
            signals: of this rank.
            mesh: the ranks.
        """
        self._signals = signals
        self._group = host_group() if dist.is_initialized() and dist.get_world_size() > 1 else None
        self._pipelined = mesh.pipeline.size > 1
        # Ranks of a pipeline are at different points at a time, and must not wait for the last of them.
        self._lag = 2 * mesh.pipeline.size if self._pipelined else 1
        self._told: deque[tuple[Work, Tensor]] = deque()
        self._possible, self._begun = False, 0.0
        self._reason: str | None = None

    @contextmanager
    def possible(self, expected: float | None) -> Iterator[None]:
        """Have points count within the block, if the step in it may take long.

        Args:
            expected: seconds that a step takes, the same on all ranks; None if nobody knows.

        Raises:
            Abandoned: on every rank.
        """
        self._possible = expected is None or expected > SECONDS_OF_A_LONG_STEP
        self._begun = time.monotonic()
        try:
            yield
            self.settle()
        finally:
            self._possible = False

    def point(self) -> bool:
        """Tell whether the next computation may be left out. Every rank passes as many points as the others in a step.

        Raises:
            Abandoned: the step ends here. In a pipeline it goes on to its end, since ranks wait for messages of others,
                without computing anything.
        """
        if not self._possible:
            return False
        if self._group is None:
            self._hear(self._wish())
        else:
            if len(self._told) >= self._lag:
                work, told = self._told.popleft()
                work.wait()
                self._hear(int(told))
            told = torch.tensor(self._wish())
            self._told.append((dist.all_reduce(told, dist.ReduceOp.MAX, self._group, async_op=True), told))
        if self._reason is not None and not self._pipelined:
            self.settle()
        return self._reason is not None

    def settle(self) -> None:
        """End what ranks are telling each other.

        Raises:
            Abandoned: the step has been given up.
        """
        while self._told:
            self._told.popleft()[0].wait()
        if self._reason is not None:
            raise Abandoned(self._reason)

    def _wish(self) -> int:
        """1 and more for a signal that this rank has received; 0 to go on."""
        late = time.monotonic() - self._begun > SECONDS_OF_A_LONG_STEP
        name = self._signals.received if late else None
        return 0 if name is None else 1 + [number.name for number in SIGNALS].index(name)

    def _hear(self, wish: int) -> None:
        if wish:
            self._reason = SIGNALS[wish - 1].name
