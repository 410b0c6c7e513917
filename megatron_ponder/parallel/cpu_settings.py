"""Settings of PyTorch and of the allocator that a process needs to compute fast on a CPU."""

import ctypes
import os
import socket

import torch
import torch.distributed as dist

from megatron_ponder.base.environment import read_threads


def prepare_cpu() -> None:
    """Settings that make CPU training several times faster; call once in every process that computes.

    There are as many threads as OMP_NUM_THREADS says, or as many as there were if it says nothing.

    Small gradients of pondering passes become denormal numbers, on which CPUs are slow, so they are flushed to zero.
    glibc gives large freed blocks back to the system at once, and a training step then spends its time in page faults;
    keeping them makes element-wise operations on activations about four times faster.
    """
    threads = read_threads()
    if threads is not None:
        torch.set_num_threads(threads)
    torch.set_flush_denormal(True)
    if os.uname().sysname == "Linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD of <malloc.h>
        libc.mallopt(mmap_threshold, 32 << 20)
        libc.mallopt(trim_threshold, 1 << 30)


def announce_cores(store: dist.Store) -> str:
    """Tell the other ranks which cores this process may use.

    Args:
        store: of all ranks.

    Returns:
        What `share_cores` asks for when all ranks have done so.
    """
    key = f"cores {socket.gethostname()} {' '.join(map(str, sorted(_cores())))}"
    store.add(key, 1)
    return key


def share_cores(store: dist.Store, key: str) -> None:
    """Compute with this process's share of the cores that it may use, unless OMP_NUM_THREADS says with how many.

    A launcher may have given every rank of a node cores of its own, or all of them the same.

    Args:
        store: of all ranks, which have announced their cores.
        key: what `announce_cores` returned here.
    """
    if read_threads() is None:
        torch.set_num_threads(max(1, len(_cores()) // store.add(key, 0)))


def _cores() -> set[int]:
    """Numbers of the cores that this process may use."""
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
