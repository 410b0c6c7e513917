"""Process groups of some of the ranks: how they are made, and how long their collectives wait."""

from collections.abc import Sequence
from datetime import timedelta

import torch.distributed as dist
from torch.distributed import ProcessGroup

# Until ranks give up waiting for one that does not come to a collective, unless told otherwise.
COLLECTIVE_TIMEOUT = timedelta(minutes=30)


def group_of(parts: Sequence[Sequence[int]], name: str, timeout: timedelta = COLLECTIVE_TIMEOUT) -> ProcessGroup | None:
    """The group of this rank, where each of some disjoint parts of the ranks makes one; a collective of all ranks.

    Where the default group is bound to a GPU, all parts are split from its communicator at once, so that its time does
    not grow with their number. Elsewhere ranks of other parts do nothing for a group but to note that it is not theirs.
    PyTorch's own time-outs are 10 or 30 minutes by backend, whatever the default group was told.

    Args:
        parts: ranks of each, rising.
        name: of what they are for, which logs and errors of NCCL show.
        timeout: that a rank waits for the others in a collective.

    Returns:
        None for a rank that is in no part.
    """
    if len(parts[0]) == dist.get_world_size():
        return dist.group.WORLD
    if dist.group.WORLD.bound_device_id is not None:
        return dist.split_group(split_ranks=[list(part) for part in parts], timeout=timeout, group_desc=name)
    # Ranks of no part make one too: groups of the edges of a pipeline are named by how many their ranks have by then.
    rest = sorted({*range(dist.get_world_size())}.difference(*parts))
    groups = [dist.new_group(list(part), timeout, group_desc=name) for part in (*parts, rest) if part]
    return next((group for part, group in zip(parts, groups, strict=False) if dist.get_rank() in part), None)


def host_group() -> ProcessGroup:
    """A group of all ranks whose messages go from host to host, beside what GPUs do; a collective of all ranks."""
    return dist.new_group(backend="gloo", timeout=COLLECTIVE_TIMEOUT)
