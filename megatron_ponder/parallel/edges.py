"""Groups of two ranks for the messages of a ring of pipeline ranks: one for every edge and direction.

NCCL runs the messages of a group one after another on one stream, where a send waits for its receive; messages of one
group for the whole ring would hold each other up, and with them the ranks (`benchmarks/rendezvous_sends.py`).
"""

from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist
from torch.distributed import ProcessGroup

from megatron_ponder.parallel.groups import COLLECTIVE_TIMEOUT
from megatron_ponder.parallel.mesh import Axis


@dataclass(frozen=True)
class Edges:
    """The groups of one rank with its neighbours on the ring.

    Attributes:
        from_last: what the rank before sends on.
        to_next: what this rank sends on.
        to_last: what this rank sends back.
        from_next: what the rank after sends back.
    """

    from_last: ProcessGroup
    to_next: ProcessGroup
    to_last: ProcessGroup
    from_next: ProcessGroup


def build_edges(axis: Axis, timeout: timedelta = COLLECTIVE_TIMEOUT) -> Edges:
    """Make the groups; a collective of the ranks of a ring, which make them in one order.

    Args:
        axis: the pipeline ranks, two at least.
        timeout: that a rank waits for a message.
    """
    onwards, back = (_neighbours(axis, name, timeout) for name in ("onwards", "back"))
    return Edges(onwards[axis.rank - 1], onwards[axis.rank], back[axis.rank - 1], back[axis.rank])


def _neighbours(axis: Axis, name: str, timeout: timedelta) -> dict[int, ProcessGroup]:
    """This rank's groups by the edge's first place, that of the edge from the last to the first being -1 too."""
    groups = {}
    for edges in _disjoint(axis.size):
        pairs = [(edge, (edge + 1) % axis.size) for edge in edges]
        group = _pair_of(axis, pairs, f"pipeline {name}", timeout)
        groups |= {edge: group for edge, pair in zip(edges, pairs, strict=True) if axis.rank in pair}
    return groups | {-1: groups[axis.size - 1]} if axis.rank == 0 else groups


def _disjoint(size: int) -> list[range]:
    """Edges of a ring by their first places, in sets of which none has two edges with a rank in common."""
    whole = size - size % 2
    sets = [range(0, whole, 2), range(1, whole, 2)]
    return sets if size == whole else [*sets, range(whole, size)]


def _pair_of(axis: Axis, pairs: list[tuple[int, int]], name: str, timeout: timedelta) -> ProcessGroup:
    """The group of this rank's pair, of places on the ring; of itself, if it is in none.

    For PyTorch names a group by its ranks and by how many groups there are on the rank that makes it: where one rank
    has made fewer than another, they would wait for each other under two names.
    """
    paired = {place for pair in pairs for place in pair}
    parts = [sorted(pair) for pair in pairs] + [[place] for place in range(axis.size) if place not in paired]
    if dist.group.WORLD.bound_device_id is not None:
        return dist.split_group(axis.group, parts, timeout, group_desc=name)
    own = next(part for part in parts if axis.rank in part)
    ranks = [dist.get_global_rank(axis.group, place) for place in own]
    return dist.new_group(ranks, timeout, use_local_synchronization=True, group_desc=name)
