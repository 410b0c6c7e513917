"""The grid of ranks: which ones share a layer, which ones share the stack, which ones share the data."""

from dataclasses import dataclass, replace
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from megatron_ponder.config import ParallelConfig
from megatron_ponder.config.layout import GROUPS, RARE, group_sizes, ranks_of_sample
from megatron_ponder.config.parallel import AXES
from megatron_ponder.parallel.groups import COLLECTIVE_TIMEOUT, group_of


@dataclass(frozen=True)
class Axis:
    """One dimension of the grid, seen from this rank.

    Attributes:
        size: ranks along it.
        rank: this rank's place along it.
        group: the process group of those ranks; None for a single process, which needs none.
        sequence_parallel: of tensor ranks only: between sharded layers each rank holds its share of the tokens, and not
            all of them.
    """

    size: int = 1
    rank: int = 0
    group: ProcessGroup | None = None
    sequence_parallel: bool = False

    def share(self, tokens: int) -> int:
        """Tokens that one rank holds between sharded layers, the padding of the last ranks included."""
        return -(-tokens // self.size) if self.sequence_parallel else tokens


class Mesh:
    """The grid of ranks and this rank's device. The default is a single process on the CPU.

    It has an `Axis` by the name of each of `GROUPS`, which are made of the axes that `config/parallel.py` declares.

    Attributes:
        device: of this rank.
        tensor: ranks that share each layer.
        context: ranks that share the tokens of every sequence.
        data: ranks that share the batch.
        pipeline: ranks that share the stack of layers.
        model: ranks that hold one copy of the model.
        copies: ranks that hold the same part of it, over which gradients are summed.
    """

    def __init__(self, device: torch.device | None = None, **axes: Axis) -> None:
        """Describe a grid; of an axis that is not given this process is the only rank."""
        assert axes.keys() <= GROUPS.keys(), f"no axis is called {axes.keys() - GROUPS.keys()}"
        self.device = device or torch.device("cpu")
        for name in GROUPS:
            setattr(self, name, axes.get(name, Axis()))

    @property
    def size(self) -> int:
        """Ranks in all."""
        return self.model.size * self.copies.size


def build_mesh(device: torch.device, parallel: ParallelConfig, timeout: timedelta = COLLECTIVE_TIMEOUT) -> Mesh:
    """The grid over all ranks of the default process group, of which those beyond one copy of the model share the data.

    What lies along several axes is the same group, with one communicator, where its ranks are the same. There is none
    of a context rank alone.

    Args:
        device: where this rank computes.
        parallel: sizes of the axes.
        timeout: that a rank waits for the others in a collective of some of them.
    """
    sizes = group_sizes(parallel, dist.get_world_size() // ranks_of_sample(parallel))
    parts = {name: _parts(sizes, name) for name in GROUPS if sizes[name] > 1 or name not in RARE}
    groups = {}
    for name, ranks in parts.items():
        if ranks not in groups:
            groups[ranks] = group_of(ranks, name, timeout)
    axes = {name: Axis(sizes[name], dist.get_rank(groups[ranks]), groups[ranks]) for name, ranks in parts.items()}
    axes["tensor"] = replace(axes["tensor"], sequence_parallel=parallel.sequence_parallel)
    return Mesh(device, **axes)


def ends_of(mesh: Mesh, timeout: timedelta = COLLECTIVE_TIMEOUT) -> Axis:
    """The ranks of the first and the last place in the pipeline, over all copies; a collective of all ranks.

    Tensor ranks have a group each. Ranks between the ends are in none, but of the same axis.
    """
    sizes = {axis: getattr(mesh, axis).size for axis in AXES}
    grid = torch.arange(dist.get_world_size()).view([sizes[axis] for axis in reversed(AXES)])
    pipeline, tensor = (grid.dim() - 1 - AXES.index(axis) for axis in ("pipeline", "tensor"))
    ends = grid.index_select(pipeline, torch.tensor([0, sizes["pipeline"] - 1])).movedim(tensor, 0).flatten(1)
    parts = ends.sort().values.tolist()
    group = group_of(parts, "pipeline ends", timeout)
    return Axis(len(parts[0]), 0 if group is None else dist.get_rank(group), group)


def _parts(sizes: dict[str, int], name: str) -> tuple[tuple[int, ...], ...]:
    """Ranks of each group of a name, where neighbours along the first axis are neighbours in number."""
    grid = torch.arange(dist.get_world_size()).view([sizes[axis] for axis in reversed(AXES)])
    along = [grid.dim() - 1 - AXES.index(axis) for axis in reversed(GROUPS[name])]
    parts = grid.movedim(along, tuple(range(-len(along), 0))).reshape(-1, sizes[name])
    return tuple(map(tuple, parts.tolist()))
