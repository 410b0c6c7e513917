"""Search for the ranks that hold the others up.

Nothing here waits for another rank in the middle of a step: what ranks tell each other travels while the next one runs.
"""

import socket
import statistics
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor


class RankTime(NamedTuple):
    """Seconds a step that a rank spent alone, mean over a window of steps.

    Attributes:
        data: until its micro-batches were there.
        blocks: in the forward passes of its blocks, as if it had as many of them as the average pipeline rank.
    """

    data: float
    blocks: float

    @property
    def total(self) -> float:
        """Both."""
        return self.data + self.blocks


class Stragglers:
    """Finds ranks that are slower than others.

    All ranks of a step end it together, because they wait for each other, so that its time tells nothing. What a rank
    does alone tells: waiting for data, and the forward passes of its blocks, in which only tensor ranks wait for each
    other (and at ZeRO 3 data ranks for weights). Windows of steps are gathered beside the step that follows them.
    """

    def __init__(self, interval: int, factor: float, blocks_share: float, device: torch.device) -> None:
        """Agree on the hosts' names, which every rank has to do at the same time.

        Args:
            interval: steps of a window; 0 for none.
            factor: times the median from which a rank is reported.
            blocks_share: blocks of this rank, of those of the average pipeline rank.
            device: of this rank.
        """
        self._ranks = dist.get_world_size() if dist.is_initialized() else 1
        self._interval = interval if self._ranks > 1 else 0
        self._factor, self._share, self._device = factor, blocks_share, device
        self._sums, self._steps = [0.0, 0.0], 0
        self._pending: tuple[dist.Work, Tensor] | None = None
        self._hosts = [""] * self._ranks
        if self._interval:
            dist.all_gather_object(self._hosts, socket.gethostname())

    def add(self, data: float, blocks: float) -> list[RankTime] | None:
        """Count a step.

        Args:
            data: seconds that this rank waited for its micro-batches.
            blocks: seconds of its blocks' forward passes.

        Returns:
            The times of all ranks in the window that ended with the step before; None if none did.
        """
        if not self._interval:
            return None
        finished = self.finish()
        self._sums = [self._sums[0] + data, self._sums[1] + blocks / self._share]
        self._steps += 1
        if self._steps == self._interval:
            own = torch.tensor(self._sums, dtype=torch.float64, device=self._device) / self._steps
            everyone = own.new_empty(self._ranks * len(own))
            gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # renamed in PyTorch 2.13
            self._pending = gather(everyone, own, async_op=True), everyone
            self._sums, self._steps = [0.0, 0.0], 0
        return finished

    def finish(self) -> list[RankTime] | None:
        """Wait for the times that are still on their way."""
        if self._pending is None:
            return None
        (work, everyone), self._pending = self._pending, None
        work.wait()
        return [RankTime(*pair) for pair in everyone.view(-1, 2).tolist()]

    def report(self, times: Sequence[RankTime]) -> str | None:
        """The table of `slow_ranks` for one window."""
        return slow_ranks(times, self._hosts, self._factor, self._interval)


def slowest_fields(times: Sequence[RankTime]) -> dict[str, float]:
    """The slowest rank of a window, as fields of a record."""
    slowest = max(range(len(times)), key=lambda rank: times[rank].total)
    median = statistics.median(rank.total for rank in times)
    return {"slowest_rank": slowest, "slowest_over_median": times[slowest].total / median}


def slow_ranks(times: Sequence[RankTime], hosts: Sequence[str], factor: float, steps: int, most: int = 8) -> str | None:
    """A table of the ranks that take more than `factor` times the median, slowest first; None without any.

    Args:
        times: of every rank.
        hosts: of every rank.
        factor: times the median.
        steps: that the times are means of.
        most: rows at most.
    """
    median = statistics.median(rank.total for rank in times)
    slow = sorted(
        (rank for rank, own in enumerate(times) if own.total > factor * median), key=lambda r: -times[r].total
    )
    if not slow:
        return None
    width = max(len(host) for host in ("host", *(hosts[rank] for rank in slow[:most])))
    lines = [
        f"{len(slow)} of {len(times)} ranks slower than {factor:g} × the median, {median:.3f} s a step of their own "
        f"over {steps} steps",
        f"{'rank':>8}  {'host':<{width}}  {'waiting for data, s':>19}  {'blocks forward, s':>17}  {'/ median':>8}",
    ]
    lines += [
        f"{rank:>8}  {hosts[rank]:<{width}}  {times[rank].data:>19.3f}  {times[rank].blocks:>17.3f}  "
        f"{times[rank].total / median:>8.2f}"
        for rank in slow[:most]
    ]
    return "\n".join(lines)
