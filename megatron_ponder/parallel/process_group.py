"""The process group of a run: how it begins and ends, and on which device this rank computes."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta

import torch
import torch.distributed as dist

from megatron_ponder.base.environment import variables_kept
from megatron_ponder.base.launch import Launch
from megatron_ponder.parallel import gpu_settings
from megatron_ponder.parallel.cpu_settings import announce_cores, prepare_cpu, share_cores
from megatron_ponder.parallel.failures import FailureWatch
from megatron_ponder.parallel.groups import COLLECTIVE_TIMEOUT
from megatron_ponder.parallel.rendezvous import meet


@contextmanager
def process_group(
    launch: Launch, timeout: timedelta = COLLECTIVE_TIMEOUT, patience: float = 300.0, deterministic: bool = False
) -> Iterator[torch.device]:
    """Join the other ranks for as long as the context lasts, and say on which device this rank computes.

    NCCL on GPUs and gloo on CPUs. Also exports the variables that libraries below us read, for as long, divides the
    cores that this process may use between the ranks that share them unless OMP_NUM_THREADS says otherwise, and
    prepares the CPU (see `prepare_cpu`) and the GPU (`prepare_gpu`).

    If there are several ranks, an error that is not all of theirs ends this process, and the others (`FailureWatch`).

    Args:
        launch: the place of this process among the ranks.
        timeout: that a rank waits for the others in a collective of all of them.
        patience: seconds to wait for the other ranks at the start.
        deterministic: compute bit for bit alike in every run on GPUs too.

    Raises:
        UserError: no GPU is left for this rank, or the ranks do not find each other.
    """
    prepare_cpu()
    with variables_kept(), _left_at_the_end():  # a library that finds them afterwards would make a group of its own
        gpu_settings.tell_cuda(os.environ, deterministic)
        store = meet(launch, patience, COLLECTIVE_TIMEOUT)
        with FailureWatch(store, launch) if launch.world_size > 1 else nullcontext():
            device, cores = _device(launch, store, deterministic), announce_cores(store)
            tell_libraries(launch, device)
            dist.init_process_group(
                backend="nccl" if device.type == "cuda" else "gloo",
                store=store,
                rank=launch.rank,
                world_size=launch.world_size,
                timeout=timeout,
                device_id=device if device.type == "cuda" else None,
            )
            share_cores(store, cores)
            yield device


@contextmanager
def _left_at_the_end() -> Iterator[None]:
    try:
        yield
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _device(launch: Launch, store: dist.Store, deterministic: bool) -> torch.device:
    """The GPU of this rank, ready, or the CPU."""
    index = gpu_settings.gpu_index(launch, gpu_settings.visible_gpus())
    gpu_settings.check_gpu(launch, store, None if index is None else gpu_settings.gpu_name(index))
    if index is None:
        return torch.device("cpu")
    device = torch.device("cuda", index)
    torch.cuda.set_device(device)
    gpu_settings.prepare_gpu(deterministic)
    return device


def tell_libraries(launch: Launch, device: torch.device) -> None:
    """Export the variables in which libraries below us look for the place of this process."""
    # DeepSpeed takes it for the number of the GPU, of which this process may see one alone
    local_rank = str(launch.local_rank if device.index is None else device.index)
    os.environ.update(
        RANK=str(launch.rank),
        WORLD_SIZE=str(launch.world_size),
        LOCAL_RANK=local_rank,
        LOCAL_SIZE=str(launch.local_size),
        MASTER_ADDR=launch.address,
        MASTER_PORT=str(launch.port),
    )
    if "OMPI_COMM_WORLD_LOCAL_RANK" in os.environ:
        # Open MPI may count the ranks of a node in another order than ours, and DeepSpeed refuses two numbers
        os.environ["OMPI_COMM_WORLD_LOCAL_RANK"] = local_rank
