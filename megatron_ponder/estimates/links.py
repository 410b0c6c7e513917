"""What messages travel over on a cluster, and how long they take."""

import math
from dataclasses import dataclass

from megatron_ponder.cluster.hardware import Hardware
from megatron_ponder.config.layout import GROUPS
from megatron_ponder.config.parallel import AXES
from megatron_ponder.estimates.communication import Term
from megatron_ponder.estimates.rank import Rank


def collective_seconds(term: Term, ranks: int, bandwidth: float, latency: float) -> float:
    """A ring moves 2 (n − 1) / n of an all-reduce's message over each link, half as much for its two halves.

    So much of its message an all-to-all moves, too. As counted in NCCL's tests (doc/PERFORMANCE.md). Latency is that of
    a tree, ⌈log₂ n⌉ hops there, and for an all-reduce back.
    """
    if term.operation == "send":
        return term.calls * latency + term.bytes / bandwidth
    ways = 2 if term.operation == "all-reduce" else 1
    return (
        term.calls * ways * math.ceil(math.log2(ranks)) * latency + ways * (ranks - 1) / ranks * term.bytes / bandwidth
    )


@dataclass(frozen=True)
class Links:
    """What the ranks of an axis communicate over."""

    rank: Rank
    cluster: Hardware

    def of(self, axis: str) -> tuple[int, float, float]:
        """Ranks, bandwidth and latency of an axis.

        A ring over nodes enters and leaves each of them once, through the network ports of as many GPUs as it has
        members there: its bandwidth is theirs together, and at most that inside a node.
        """
        cluster, ranks = self.cluster, self.rank.axes[axis]
        if self._extent(axis) <= cluster.gpus_per_node:
            return ranks, cluster.intra_bandwidth * cluster.link_share, cluster.intra_latency
        ports = max(1, min(ranks, cluster.gpus_per_node // self._within(axis))) if axis in ("data", "copies") else 1
        bandwidth = min(cluster.intra_bandwidth, ports * cluster.inter_bandwidth)
        return ranks, bandwidth * cluster.link_share, cluster.inter_latency

    def _extent(self, axis: str) -> int:
        """Ranks among which those of one group lie."""
        return max(self._within(name) * self.rank.axes[name] for name in GROUPS[axis] if self.rank.axes[name] > 1)

    def _within(self, axis: str) -> int:
        """Ranks that share a place on an axis and on those farther apart, which lie between two of its neighbours."""
        return math.prod(self.rank.axes[name] for name in AXES[: AXES.index(GROUPS[axis][0])])
