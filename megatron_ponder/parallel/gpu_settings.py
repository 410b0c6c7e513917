"""The GPU of a rank, and what CUDA, NCCL and PyTorch are told before they start on it."""

import socket
from collections.abc import MutableMapping

import torch
import torch.distributed as dist

from megatron_ponder.base.environment import read_word
from megatron_ponder.base.errors import UserError
from megatron_ponder.base.launch import Launch

# What is set unless the user has set it; the second is the older name of the first, which PyTorch reads too.
ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
ALWAYS = {
    # An error or a time-out of NCCL ends the process, without waiting for what cannot end.
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "3",
}
ONE_EACH = "start one rank for each GPU, and let every rank see all GPUs of its node or its own alone"
DETERMINISTIC = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}


def visible_gpus() -> int:
    """GPUs that this process may use."""
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def gpu_index(launch: Launch, visible: int) -> int | None:
    """Number of the GPU of a rank, among those that its process sees; None for the CPU.

    Either every process sees all GPUs of its node, or its launcher shows it one alone.

    Args:
        launch: the place of the process among the ranks.
        visible: GPUs that it sees.

    Raises:
        UserError: the ranks of the node are more than these.
    """
    if visible in (0, 1):
        return 0 if visible else None
    if visible < launch.local_size:
        raise UserError(
            f"{socket.gethostname()} has {launch.local_size} ranks, and rank {launch.rank} sees {visible} GPUs; "
            f"{ONE_EACH}"
        )
    return launch.local_rank


def check_gpu(launch: Launch, store: dist.Store, name: str | None) -> None:
    """Refuse a GPU that another rank has, and a rank without one among others that have.

    Args:
        launch: the place of this process among the ranks.
        store: of all ranks.
        name: of this rank's GPU, which no other GPU has; None for the CPU.

    Raises:
        UserError: on a rank that comes second.
    """
    kind = "no GPU" if name is None else "a GPU"
    first, first_kind = store.compare_set("device", "", f"{launch.rank} {kind}").decode().split(" ", 1)
    if kind != first_kind:
        raise UserError(
            f"rank {launch.rank} on {socket.gethostname()} has {kind}, and rank {first} has {first_kind}; see with "
            "nvidia-smi what is wrong on the node that lacks them, or hide all of them with CUDA_VISIBLE_DEVICES="
        )
    if name is None:
        return
    owner = int(store.compare_set(name, "", str(launch.rank)))
    if owner != launch.rank:
        raise UserError(f"ranks {owner} and {launch.rank} are both on {name} of {socket.gethostname()}; {ONE_EACH}")


def gpu_name(index: int) -> str:
    """A name that no other GPU has."""
    return f"GPU {torch.cuda.get_device_properties(index).uuid}"


def tell_cuda(environ: MutableMapping[str, str], deterministic: bool = False) -> None:
    """Set the variables that are read when CUDA and NCCL start, unless they are set already.

    Args:
        environ: variables of this process.
        deterministic: sums in a fixed order, as `prepare_gpu` says.
    """
    if not any(read_word(environ, name) for name in ALLOCATOR):
        # passes of many sizes would leave memory in pieces
        environ[ALLOCATOR[0]] = "expandable_segments:True"
    for name, value in (ALWAYS | (DETERMINISTIC if deterministic else {})).items():
        if not read_word(environ, name):
            environ[name] = value


def prepare_gpu(deterministic: bool = False) -> None:
    """Say how a process computes on GPUs.

    Products of fp32 numbers are those of fp32, and not TF32, whose 10 bits nobody has asked for: speed is what bf16 is
    for.

    Args:
        deterministic: use only algorithms that add up in a fixed order, and refuse what has none.
    """
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.benchmark = False
    if deterministic:
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # nothing reads it
