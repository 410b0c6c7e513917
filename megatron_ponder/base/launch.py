"""Who am I: the one place where a process finds out its rank, and where process groups begin and end."""

import ctypes
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from megatron_ponder.base.environment import read_host, read_number, read_port, read_threads, read_word
from megatron_ponder.base.errors import UserError

# Until ranks give up waiting for one that does not come to a collective, unless told otherwise.
COLLECTIVE_TIMEOUT = timedelta(minutes=30)
# For what listens where rank 0 should, after the time in which all ranks should have come.
SECONDS_TO_ANSWER = 10.0


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


@contextmanager
def process_group(
    launch: Launch, timeout: timedelta = COLLECTIVE_TIMEOUT, patience: float = 300.0
) -> Iterator[torch.device]:
    """Join the other ranks for as long as the context lasts, and say on which device this rank computes.

    NCCL on GPUs and gloo on CPUs. Also exports the variables that libraries below us read, divides the cores between
    the ranks of a node unless OMP_NUM_THREADS says otherwise, and prepares the CPU (see `prepare_cpu`).

    Args:
        launch: the place of this process among the ranks.
        timeout: that a rank waits for the others in a collective of all of them.
        patience: seconds to wait for the other ranks at the start.

    Raises:
        UserError: no GPU is left for this rank, or the ranks do not find each other.
    """
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", launch.local_rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        if launch.local_rank >= torch.cuda.device_count():
            raise UserError(
                f"local rank {launch.local_rank} finds {torch.cuda.device_count()} GPUs; start one process per GPU"
            )
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // launch.local_size))
    prepare_cpu()
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
    dist.init_process_group(
        backend="nccl" if on_gpu else "gloo",
        store=_meet(launch, patience),
        rank=launch.rank,
        world_size=launch.world_size,
        timeout=timeout,
        device_id=device if on_gpu else None,
    )
    try:
        yield device
    finally:
        dist.destroy_process_group()


def _meet(launch: Launch, patience: float) -> dist.Store:
    """The store through which all ranks find each other, once all have come.

    Raises:
        UserError: they have not within `patience` seconds, or the port is another program's.
    """
    under_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # torchrun has a store already
    if launch.world_size == 1 and not under_agent:
        return dist.HashStore()
    hosts = launch.rank == 0 and not under_agent
    where = f"{launch.address}:{launch.port}"
    gone = (
        f"not all {launch.world_size} ranks have come to {where} within {patience:.0f} seconds; look whether every "
        "rank has been started, and whether all have the MASTER_ADDR and MASTER_PORT of the node of rank 0"
    )
    with _given_up_after(patience + SECONDS_TO_ANSWER, f"rank {launch.rank}: error: {gone}"):
        begun = time.monotonic()
        if not hosts:
            _wait_for_listener(launch, patience)
        left = max(1.0, patience - (time.monotonic() - begun))
        try:
            store = dist.TCPStore(
                "localhost" if hosts else launch.address,
                launch.port,
                launch.world_size,
                is_master=hosts,
                timeout=timedelta(seconds=left),
                multi_tenant=not under_agent,
            )
        except dist.DistError as error:
            if "EADDRINUSE" in str(error):
                raise UserError(
                    f"port {launch.port} on {socket.gethostname()} is in use by another program, or by ranks that an "
                    "earlier run has left; set MASTER_PORT to another port on every rank"
                ) from error
            raise UserError(gone) from error
    store.set_timeout(COLLECTIVE_TIMEOUT)
    return store


def _wait_for_listener(launch: Launch, patience: float) -> None:
    """Wait until something listens where rank 0 should."""
    deadline = time.monotonic() + patience
    while True:
        try:
            socket.create_connection((launch.address, launch.port), timeout=min(10.0, patience)).close()
            return
        except OSError as error:
            if time.monotonic() >= deadline:
                raise UserError(
                    f"rank {launch.rank} has not reached rank 0 at {launch.address}:{launch.port} within "
                    f"{patience:.0f} seconds ({error.strerror or error}); set MASTER_ADDR to the host name or address "
                    "of the node of rank 0, and MASTER_PORT to a port that is open between the nodes"
                ) from error
            time.sleep(min(0.2, patience))


@contextmanager
def _given_up_after(seconds: float, message: str) -> Iterator[None]:
    """End the process with a message and code 2 if the block takes longer; what answers may be no rank at all."""

    def give_up() -> None:
        print(message, file=sys.stderr, flush=True)
        os._exit(2)

    timer = threading.Timer(seconds, give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


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
        local_size=_slurm_tasks_on_node(environ["SLURM_STEP_TASKS_PER_NODE"], node),
        address=read_host(environ, "MASTER_ADDR") or first_host(environ["SLURM_STEP_NODELIST"].strip()),
        # jobs that share a node must not share a port; ids that follow each other give ports that do
        port=read_port(environ, "MASTER_PORT") or 20000 + job % 20000,
        source="slurm",
    )


def _slurm_tasks_on_node(compressed: str, node: int) -> int:
    """SLURM_STEP_TASKS_PER_NODE is compressed: `4(x2),3` means 4, 4 and 3."""
    first = 0  # node of a part
    for part in compressed.strip().split(","):
        found = re.fullmatch(r"([0-9]{1,9})(?:\(x([0-9]{1,9})\))?", part)
        if found is None:
            break
        first += int(found.group(2) or 1)
        if node < first:
            return int(found.group(1))
    raise UserError(
        f'SLURM_STEP_TASKS_PER_NODE is "{compressed}", which says nothing of node {node} (SLURM_NODEID); leave '
        "both to srun, or start with torchrun"
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


def first_host(node_list: str) -> str:
    """First host of a SLURM node list such as `gpu[007-010,12]-ib,login1`."""
    if shutil.which("scontrol"):
        found = subprocess.run(
            ["scontrol", "show", "hostnames", node_list], capture_output=True, text=True, check=False
        ).stdout.split()
        if found:
            return found[0]
    first = re.match(r"(?:\[[^\]]+\]|[^,\[\]])+", node_list)
    if first is None:
        raise UserError(f'SLURM_STEP_NODELIST is "{node_list}", which names no host; leave it to srun')
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", first.group())


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


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]
