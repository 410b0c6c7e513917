"""The grid of ranks: which ones share a layer, which ones share the stack, which ones share the data."""

from dataclasses import dataclass, field

import torch
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import init_device_mesh


@dataclass(frozen=True)
class Axis:
    """One dimension of the grid, seen from this rank.

    Attributes:
        size: ranks along it.
        rank: this rank's place along it.
        group: the process group of those ranks; None for a single process, which needs none.
    """

    size: int = 1
    rank: int = 0
    group: ProcessGroup | None = None


@dataclass(frozen=True)
class Mesh:
    """The grid of ranks and this rank's device. The default is a single process on the CPU.

    Tensor ranks are neighbours, so that they lie inside a node; pipeline ranks are farthest apart.
    """

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    tensor: Axis = Axis()
    data: Axis = Axis()
    pipeline: Axis = Axis()


def build_mesh(device: torch.device, tensor: int, pipeline: int, data: int) -> Mesh:
    """The grid over all ranks of the default process group.

    Args:
        device: where this rank computes.
        tensor: ranks that share each layer.
        pipeline: ranks that share the stack of layers.
        data: ranks that share the batch.
    """
    names = ("pipeline", "data", "tensor")
    grid = init_device_mesh(device.type, (pipeline, data, tensor), mesh_dim_names=names)
    axes = {
        name: Axis(size=grid[name].size(), rank=grid[name].get_local_rank(), group=grid.get_group(name))
        for name in names
    }
    return Mesh(device=device, **axes)
