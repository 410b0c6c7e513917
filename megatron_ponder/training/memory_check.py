"""Refusal of runs that cannot fit into the memory of their ranks, before any of it is taken."""

import os
import socket
from contextlib import suppress
from pathlib import Path

import psutil
import torch

from megatron_ponder.base.environment import read_number
from megatron_ponder.base.errors import UserError
from megatron_ponder.config import Config
from megatron_ponder.estimates.memory import memory_estimate
from megatron_ponder.estimates.rank import Rank
from megatron_ponder.parallel.collectives import from_all

GIB = 2**30
# Shares of the memory from which a run may fail, for what libraries need comes on top, and cannot work at all.
DOUBTFUL, HOPELESS = 0.9, 3.0
_CGROUPS = Path("/sys/fs/cgroup")


def check_memory(config: Config, data_size: int, device: torch.device) -> str | None:
    """Compare the expected peak of a rank with the memory that it has; a collective of all ranks.

    Args:
        config: resolved, with a vocabulary size.
        data_size: data-parallel ranks.
        device: of this rank.

    Returns:
        A warning if they are close; None if they are not.

    Raises:
        UserError: on every rank, if the run is hopeless, and `training.allow_memory_overcommit` not set.
    """
    places = range(config.parallel.pipeline)
    peak = max(memory_estimate(Rank(config, data_size, place, device.type)).total for place in places)
    least, host = min(from_all((memory_of_a_rank(device), socket.gethostname())))
    if peak <= DOUBTFUL * least:
        return None
    what = "its GPU" if device.type == "cuda" else "its share of the host"
    found = f"the expected peak of a rank is {peak / GIB:,.1f} GiB, and {what} ({host}) has {least / GIB:,.1f}"
    if peak <= HOPELESS * least or config.training.allow_memory_overcommit:
        return f"{found}: it may end for want of memory"
    raise UserError(
        f"{found}; lower training.micro_batch_size, set training.recompute to block, or use more ranks "
        "(ponder estimate tells what fits); training.allow_memory_overcommit true starts it all the same",
        shared=True,
    )


def memory_of_a_rank(device: torch.device) -> float:
    """Bytes of this rank's GPU, or its share of what this host lets its processes have."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return min([psutil.virtual_memory().total, *_limits()]) / (read_number(os.environ, "LOCAL_SIZE", 1) or 1)


def _limits() -> list[int]:
    """Bytes that control groups, such as those of a container or of a SLURM job, allow this process."""
    limits = []
    for path in (_CGROUPS, *_own_groups()):
        for name in ("memory.max", "memory.limit_in_bytes"):
            with suppress(OSError, ValueError):  # of other hierarchies, or "max"
                limits.append(int((path / name).read_text(encoding="ascii")))
    return limits


def _own_groups() -> list[Path]:
    """This process's group of either version of control groups, and those above it."""
    groups = []
    with suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines():
            _, controllers, name = line.split(":", 2)
            root = _CGROUPS / "memory" if "memory" in controllers.split(",") else _CGROUPS
            group = root / name.lstrip("/")
            groups += [group, *(above for above in group.parents if above.is_relative_to(root))]
    return groups
