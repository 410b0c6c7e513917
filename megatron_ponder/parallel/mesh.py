"""The grid of ranks: which ones share a layer, which ones share the stack, which ones share the data."""

from dataclasses import dataclass, field, replace

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import init_device_mesh

from megatron_ponder.config import ParallelConfig
from megatron_ponder.config.layout import AXES, copy_size, grid_sizes


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


@dataclass(frozen=True)
class Mesh:
    """The grid of ranks and this rank's device. The default is a single process on the CPU.

    Attributes:
        device: of this rank.
        tensor: ranks that share each layer.
        data: ranks that share the batch.
        pipeline: ranks that share the stack of layers.
        model: tensor and pipeline ranks together, which hold one copy of the model.
    """

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    tensor: Axis = Axis()
    data: Axis = Axis()
    pipeline: Axis = Axis()
    model: Axis = Axis()

    @property
    def size(self) -> int:
        """Ranks in all."""
        return self.model.size * self.data.size


def build_mesh(device: torch.device, parallel: ParallelConfig) -> Mesh:
    """The grid over all ranks of the default process group, of which those beyond one copy of the model share the data.

    Args:
        device: where this rank computes.
        parallel: sizes of the axes.
    """
    names, copy = AXES[::-1], copy_size(parallel)
    sizes = grid_sizes(parallel, dist.get_world_size() // copy)
    grid = init_device_mesh(device.type, tuple(sizes[name] for name in names), mesh_dim_names=names)
    axes = {name: Axis(sizes[name], grid[name].get_local_rank(), grid.get_group(name)) for name in names}
    axes["tensor"] = replace(axes["tensor"], sequence_parallel=parallel.sequence_parallel)
    copies = grid.mesh.movedim(names.index("data"), 0).flatten(1).tolist()
    group, _ = dist.new_subgroups_by_enumeration(copies)
    return Mesh(device=device, **axes, model=Axis(copy, dist.get_rank(group), group))
