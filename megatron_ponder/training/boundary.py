"""Stopping before the end with nothing lost: what ranks agree on about signals and the end of a job's time."""

import time
from collections import deque

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_ponder.base.errors import UserError
from megatron_ponder.base.signals import SIGNALS, StopSignals
from megatron_ponder.parallel.collectives import together
from megatron_ponder.parallel.mesh import Mesh

# What may stop a run, in the order of the columns that ranks add up.
REASONS = (*(number.name for number in SIGNALS), "its time limit")
# Of what a step and a checkpoint have taken, so that a slower one still fits.
MARGIN = 1.5


class Boundary:
    """The point between two steps, at which ranks add up their sums and agree on whether to stop.

    What a rank has to say, about stopping or about a problem of its own, travels with the sums, so that it costs no
    message.

    Attributes:
        stop: why all ranks are to stop, one of `REASONS`; None to go on.
        step_seconds: that the last step has taken on the first rank, known to all; None before there was one.
    """

    def __init__(self, signals: StopSignals, seconds_left: float | None, mesh: Mesh) -> None:
        """Begin.

        Args:
            signals: of this rank.
            seconds_left: until the job is ended from outside; None for no such end.
            mesh: the ranks.
        """
        self._signals, self._mesh = signals, mesh
        self._together = dist.is_initialized() and dist.get_world_size() > 1
        self._leader = not self._together or dist.get_rank() == 0
        self._given = seconds_left
        self._end = None if seconds_left is None else time.monotonic() + seconds_left
        self._steps: deque[float] = deque(maxlen=50)
        self._begun = time.monotonic()
        self._saving: float | None = None
        self.stop: str | None = None
        self.step_seconds: float | None = None

    def begin(self, saving: float | None) -> None:
        """A step begins.

        Args:
            saving: seconds that the longest save so far has taken; None before the first.
        """
        self._begun, self._saving = time.monotonic(), saving

    def cross(self, sums: Tensor, problem: str | None = None) -> Tensor:
        """End a step; a collective of all ranks.

        Args:
            sums: (n,), fp64, of this data-parallel rank, the same on the ranks that hold one copy of the model.
            problem: for which all ranks have to end; None for none.

        Returns:
            Their sum over the data-parallel ranks, on every rank, in the memory of its host.

        Raises:
            UserError: on every rank, if any has a problem, with that of the first.
        """
        self._steps.append(time.monotonic() - self._begun)
        own = sums.new_tensor([self._steps[-1] if self._leader else 0.0])
        agreed = self._agree(torch.cat([sums, own]), problem)
        self.step_seconds = float(agreed[-1])
        return agreed[:-1]

    def poll(self, problem: str | None = None) -> bool:
        """Ask whether all ranks are to stop, in work that is no step; a collective of all ranks.

        Args:
            problem: as in `cross`.

        Raises:
            UserError: as `cross`.
        """
        self._agree(torch.zeros(0, dtype=torch.float64, device=self._mesh.device), problem)
        return self.stop is not None

    def _agree(self, sums: Tensor, problem: str | None) -> Tensor:
        wish = self._wish()
        own = [float(problem is not None), *(float(reason == wish) for reason in REASONS)]
        if not self._together:
            sums, (troubled, *wishes) = sums.cpu(), own
        else:
            if self._mesh.model.rank > 0:
                sums = torch.zeros_like(sums)  # the first rank of a copy of the model speaks for all of them
            message = torch.cat([sums, sums.new_tensor(own)])
            dist.all_reduce(message)
            message = message.cpu()
            sums, (troubled, *wishes) = message[: len(sums)], message[len(sums) :].tolist()
        if troubled:
            together(lambda: _raise(problem))
        if self.stop is None:
            self.stop = next((reason for reason, count in zip(REASONS, wishes, strict=True) if count), None)
        return sums

    def _wish(self) -> str | None:
        """The reason for which this rank wants to stop. Time is rank 0's alone, because clocks of nodes differ."""
        if self._signals.received is not None:
            return self._signals.received
        if self._leader and self._end is not None and self._end - time.monotonic() < self._needed():
            return REASONS[-1]
        return None

    def _needed(self) -> float:
        """Seconds that another step and a checkpoint take, with a margin.

        Until a save has been measured it is taken for a minute, or a tenth of the time there was, if that is less.
        """
        saving = min(60.0, self._given / 10) if self._saving is None else self._saving
        return MARGIN * (max(self._steps, default=0.0) + saving)


def _raise(problem: str | None) -> None:
    if problem is not None:
        raise UserError(problem)
