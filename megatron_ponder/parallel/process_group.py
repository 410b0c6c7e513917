"""The process group of a run: how it begins and ends, and on which device this rank computes."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta

import torch
import torch.distributed as dist

from megatron_ponder.base.errors import UserError
from megatron_ponder.base.launch import Launch
from megatron_ponder.parallel.cpu_settings import prepare_cpu
from megatron_ponder.parallel.failures import FailureWatch
from megatron_ponder.parallel.rendezvous import meet

# Until ranks give up waiting for one that does not come to a collective, unless told otherwise.
COLLECTIVE_TIMEOUT = timedelta(minutes=30)


@contextmanager
def process_group(
    launch: Launch, timeout: timedelta = COLLECTIVE_TIMEOUT, patience: float = 300.0
) -> Iterator[torch.device]:
    """Join the other ranks for as long as the context lasts, and say on which device this rank computes.

    NCCL on GPUs and gloo on CPUs. Also exports the variables that libraries below us read, divides the cores between
    the ranks of a node unless OMP_NUM_THREADS says otherwise, and prepares the CPU (see `prepare_cpu`).

    If there are several ranks, an error that is not all of theirs ends this process, and the others (`FailureWatch`).

    Args:
        launch: the place of this process among the ranks.
        timeout: that a rank waits for the others in a collective of all of them.
        patience: seconds to wait for the other ranks at the start.

    Raises:
        UserError: no GPU is left for this rank, or the ranks do not find each other.
    """
    device = _device(launch)
    on_gpu = device.type == "cuda"
    prepare_cpu()
    _tell_libraries(launch)
    store = meet(launch, patience, COLLECTIVE_TIMEOUT)
    dist.init_process_group(
        backend="nccl" if on_gpu else "gloo",
        store=store,
        rank=launch.rank,
        world_size=launch.world_size,
        timeout=timeout,
        device_id=device if on_gpu else None,
    )
    try:
        with FailureWatch(store, launch) if launch.world_size > 1 else nullcontext():
            yield device
    finally:
        dist.destroy_process_group()


def _device(launch: Launch) -> torch.device:
    """The GPU of this rank, or the CPU with this rank's share of the node's cores."""
    if not torch.cuda.is_available():
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // launch.local_size))
        return torch.device("cpu")
    if launch.local_rank >= torch.cuda.device_count():
        raise UserError(
            f"local rank {launch.local_rank} finds {torch.cuda.device_count()} GPUs; start one process per GPU"
        )
    device = torch.device("cuda", launch.local_rank)
    torch.cuda.set_device(device)
    return device


def _tell_libraries(launch: Launch) -> None:
    """Export the variables in which libraries below us look for the place of this process."""
    os.environ.update(
        RANK=str(launch.rank),
        WORLD_SIZE=str(launch.world_size),
        LOCAL_RANK=str(launch.local_rank),
        LOCAL_SIZE=str(launch.local_size),
        MASTER_ADDR=launch.address,
        MASTER_PORT=str(launch.port),
    )
    if "OMPI_COMM_WORLD_LOCAL_RANK" in os.environ:
        # Open MPI may count the ranks of a node in another order than ours, and DeepSpeed refuses two numbers
        os.environ["OMPI_COMM_WORLD_LOCAL_RANK"] = str(launch.local_rank)
