"""One rank of many that are not there: PyTorch's fake process group, in which collectives end at once."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_ponder.base.environment import variables_kept
from megatron_ponder.base.launch import Launch
from megatron_ponder.parallel.process_group import tell_libraries


@contextmanager
def pretended_group(launch: Launch, rank: int) -> Iterator[torch.device]:
    """Be one rank of a run without the others, on the CPU, for as long as the context lasts.

    What the others would send is made up: ones where it is whole numbers, by which pipeline ranks agree that they know
    all shapes, and zeros where it is not. What is computed has no meaning; what is asked of whom, and in which shapes,
    is that of the run.

    Args:
        launch: of a rank 0.
        rank: to be.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore  # which registers the backend

    device = torch.device("cpu")
    with variables_kept():
        tell_libraries(replace(launch, rank=rank, local_rank=rank % launch.local_size), device)
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=launch.world_size)
        try:
            with _MadeUp():
                yield device
        finally:
            dist.destroy_process_group()


def groups_of_this_rank() -> list[int]:
    """Sizes of all process groups that this rank is in, whoever made them."""
    return [group.size() for group in dist.distributed_c10d._world.pg_names]


# Operations that the fake process group leaves undone.
MADE_UP = ("c10d::recv", "c10d::_reduce_scatter", "c10d::alltoall")


class _MadeUp(TorchDispatchMode):
    """Fills what the fake process group leaves as the memory was."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function.namespace == "c10d" and function._schema.name.startswith(MADE_UP):
            for received in tree_leaves(args[0]):
                received.fill_(0 if received.is_floating_point() else 1)
        return result
