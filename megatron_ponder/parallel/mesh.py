"""The grid of ranks: which ones share a layer, which ones share the stack, which ones share the data."""

from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import init_device_mesh

from megatron_ponder.config.layout import AXES


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


def build_mesh(device: torch.device, tensor: int, pipeline: int, data: int, sequence_parallel: bool = False) -> Mesh:
    """The grid over all ranks of the default process group.

    Args:
        device: where this rank computes.
        tensor: ranks that share each layer.
        pipeline: ranks that share the stack of layers.
        data: ranks that share the batch.
        sequence_parallel: split norms and the residual stream over the tensor ranks.
    """
    names = AXES[::-1]
    grid = init_device_mesh(device.type, (pipeline, data, tensor), mesh_dim_names=names)
    axes = {
        name: Axis(grid[name].size(), grid[name].get_local_rank(), grid.get_group(name), split)
        for name, split in zip(names, (False, False, sequence_parallel), strict=True)
    }
    copies = grid.mesh.transpose(0, 1).reshape(data, pipeline * tensor).tolist()
    group, _ = dist.new_subgroups_by_enumeration(copies)
    model = Axis(pipeline * tensor, dist.get_rank(group), group)
    return Mesh(device=device, **axes, model=model)
