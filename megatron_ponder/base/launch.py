"""Who am I: the one place where a process finds out its rank, from whichever launcher has started it."""

import functools
import os
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from megatron_ponder.base.environment import read_host, read_number, read_port, read_word
from megatron_ponder.base.errors import UserError
from megatron_ponder.base.slurm_notation import first_host, tasks_on_node


@dataclass(frozen=True)
class Launch:
    """The place of this process among the ranks of a run.

    Attributes:
        rank: from 0 to world_size - 1.
        world_size: number of processes.
        local_rank: rank on this node.
        local_size: number of processes on this node.
        address: host name or address of rank 0.
        port: TCP port on which rank 0 waits for the others.
        source: `torchrun`, `slurm`, `mpi` or `single`.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_size: int = 1
    address: str = "127.0.0.1"
    port: int = 29500
    source: str = "single"


def discover(environ: Mapping[str, str] = os.environ) -> Launch:
    """Find this process's rank from torchrun, SLURM (srun), MPI or, with none of them, as a single process.

    torchrun comes first, because under it SLURM's variables describe the agent and not the rank. SLURM counts only
    inside a job step, so that a plain `python` in a batch script is one process and does not wait for others.

    Raises:
        UserError: when a launcher's variables are incomplete, or say what cannot be.
    """
    rank, world_size = read_number(environ, "RANK"), read_number(environ, "WORLD_SIZE", 1)
    if rank is not None and world_size is not None:
        return _checked(_from_torchrun(environ, rank, world_size))
    if read_word(environ, "SLURM_STEP_ID") and (read_number(environ, "SLURM_STEP_NUM_TASKS", 1) or 1) > 1:
        return _checked(_from_slurm(environ))
    sizes = (read_number(environ, name, 1) for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE"))
    if next((size for size in sizes if size is not None), 1) > 1:
        return _from_mpi(environ)
    if rank is not None or world_size is not None:  # each of several processes would take itself for the only one
        have, lack = ("WORLD_SIZE", "RANK") if rank is None else ("RANK", "WORLD_SIZE")
        raise UserError(f"{have} is set and {lack} is not; use a launcher, set both, or unset {have} for one process")
    return Launch(port=_free_port())


def one_process(main: Callable[[Sequence[str]], None]) -> Callable[[Sequence[str]], None]:
    """The `main` of a command that knows no ranks, and would do the same work and write the same files on each of them.

    It raises a UserError on every rank where a launcher has started several processes.
    """

    @functools.wraps(main)
    def run(argv: Sequence[str]) -> None:
        processes = discover().world_size
        if processes > 1:
            name = main.__module__.rpartition(".")[2].replace("_", "-")
            raise UserError(
                f"ponder {name} works in one process, and {processes} were started; start it without a launcher, or in "
                "one task",
                shared=True,
            )
        main(argv)

    return run


def _from_torchrun(environ: Mapping[str, str], rank: int, world_size: int) -> Launch:
    address, port = read_host(environ, "MASTER_ADDR"), read_port(environ, "MASTER_PORT")
    if world_size > 1 and (address is None or port is None):
        raise UserError("RANK and WORLD_SIZE are set without MASTER_ADDR and MASTER_PORT; use torchrun or set all four")
    local_rank = read_number(environ, "LOCAL_RANK")
    local_sizes = (read_number(environ, name, 1) for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE"))
    return Launch(
        rank=rank,
        world_size=world_size,
        local_rank=rank if local_rank is None else local_rank,
        local_size=next((size for size in local_sizes if size is not None), world_size),
        address=address or "127.0.0.1",
        port=port or _free_port(),
        source="torchrun",
    )


def _from_slurm(environ: Mapping[str, str]) -> Launch:
    numbers = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_NODEID", "SLURM_JOB_ID")
    for name in (*numbers, "SLURM_STEP_NODELIST", "SLURM_STEP_TASKS_PER_NODE"):
        if read_word(environ, name) is None:
            raise UserError(f"in a SLURM job step, but {name} is not set; start with srun or torchrun")
    rank, tasks, local_rank, node, job = (read_number(environ, name) for name in numbers)
    return Launch(
        rank=rank,
        world_size=tasks,
        local_rank=local_rank,
        local_size=tasks_on_node(environ["SLURM_STEP_TASKS_PER_NODE"], node),
        address=read_host(environ, "MASTER_ADDR") or first_host(environ["SLURM_STEP_NODELIST"].strip()),
        # jobs that share a node must not share a port; ids that follow each other give ports that do
        port=read_port(environ, "MASTER_PORT") or 20000 + job % 20000,
        source="slurm",
    )


def _from_mpi(environ: Mapping[str, str]) -> Launch:
    try:
        from mpi4py import MPI
    except ImportError as error:
        raise UserError("started by mpirun, but mpi4py is missing; pip install 'megatron_ponder[mpi]'") from error
    except RuntimeError as error:  # mpi4py is there, and looks for the system's library only now
        raise UserError(
            "started by mpirun, but mpi4py finds no MPI library; name mpirun's own libmpi.so in MPI4PY_LIBMPI"
        ) from error
    world = MPI.COMM_WORLD
    node = world.Split_type(MPI.COMM_TYPE_SHARED)
    address, port = read_host(environ, "MASTER_ADDR"), read_port(environ, "MASTER_PORT")
    address, port = world.bcast((address or socket.gethostname(), port or _free_port()), root=0)
    return Launch(
        rank=world.Get_rank(),
        world_size=world.Get_size(),
        local_rank=node.Get_rank(),
        local_size=node.Get_size(),
        address=address,
        port=port,
        source="mpi",
    )


def _checked(launch: Launch) -> Launch:
    """Refuse a place that is not among the ranks."""
    if launch.rank >= launch.world_size:
        problem = f"rank {launch.rank} is not one of {launch.world_size} ranks, which count from 0"
    elif launch.local_size > launch.world_size:
        problem = f"{launch.local_size} ranks on this node are more than the {launch.world_size} in all"
    elif launch.local_rank >= launch.local_size:
        problem = f"local rank {launch.local_rank} is not one of the {launch.local_size} on this node, counted from 0"
    else:
        return launch
    names = {
        "torchrun": "RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE",
        "slurm": "SLURM_PROCID, SLURM_STEP_NUM_TASKS, SLURM_LOCALID and SLURM_STEP_TASKS_PER_NODE",
    }
    raise UserError(f"{problem}; leave {names[launch.source]} to the launcher, or set all of them")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]
