"""A cluster on paper: what its GPUs, nodes and links can do, in bytes, seconds and FLOP/s."""

from dataclasses import dataclass, fields

from megatron_ponder.base.errors import UserError
from megatron_ponder.cluster.description import Cluster, Machines
from megatron_ponder.cluster.gpus import GIGA, GPUS, TERA, Gpu

GIB = 2**30


@dataclass(frozen=True)
class Hardware:
    """What a cluster is taken to be able to do. The shares are those of `Machines`.

    Attributes:
        name: of the GPU.
        nodes: number of nodes.
        gpus_per_node: GPUs of each node that train.
        memory: bytes of a GPU.
        peak: FLOP/s of a GPU in the precision of training.
        memory_bandwidth: bytes/s.
        intra_bandwidth: bytes/s that a GPU sends to others of its node.
        inter_bandwidth: bytes/s that a GPU sends to other nodes, when all of its node send.
        intra_latency, inter_latency: seconds until a message starts to arrive.
        matrix_share, attention_share, memory_bandwidth_share, link_share, memory_share: of what is possible.
        device: `cuda`, or `cpu` for tests of the model on CPUs.
    """

    name: str
    nodes: int
    gpus_per_node: int
    memory: float
    peak: float
    memory_bandwidth: float
    intra_bandwidth: float
    inter_bandwidth: float
    intra_latency: float = Machines.intra_latency_us * 1e-6
    inter_latency: float = Machines.inter_latency_us * 1e-6
    matrix_share: float = Machines.matrix_share
    attention_share: float = Machines.attention_share
    memory_bandwidth_share: float = Machines.memory_bandwidth_share
    link_share: float = Machines.link_share
    memory_share: float = Machines.memory_share
    device: str = "cuda"

    @property
    def ranks(self) -> int:
        """One for each GPU."""
        return self.nodes * self.gpus_per_node

    @property
    def usable_memory(self) -> float:
        """Bytes of a GPU that tensors may take."""
        return self.memory * self.memory_share


def hardware_of(cluster: Cluster, precision: str) -> Hardware:
    """What a cluster can do in training at this precision.

    Raises:
        UserError: for an unknown GPU, or a number that is missing.
    """
    if cluster.ranks < 1:
        raise UserError("gpus_per_node is 0, and an estimate is of GPUs; say how many a node has")
    gpu = _gpu(cluster, precision)
    return Hardware(
        name=cluster.gpu or "GPU",
        nodes=cluster.nodes,
        gpus_per_node=cluster.ranks,
        memory=_rate("memory-gib", cluster.memory_gib, GIB, gpu and gpu.memory * GIGA),
        peak=_rate("tflops", cluster.tflops, TERA, gpu and gpu.peak(precision)),
        memory_bandwidth=_rate("memory-bandwidth", cluster.memory_bandwidth, GIGA, gpu and gpu.memory_bandwidth),
        intra_bandwidth=_rate("intra-bandwidth", cluster.intra_bandwidth, GIGA, gpu and gpu.link),
        inter_bandwidth=cluster.inter_bandwidth * GIGA,
        intra_latency=cluster.intra_latency_us * 1e-6,
        inter_latency=cluster.inter_latency_us * 1e-6,
        **{item.name: getattr(cluster, item.name) for item in fields(Machines) if item.name.endswith("_share")},
    )


def _gpu(cluster: Machines, precision: str) -> Gpu | None:
    """The GPU that is named; None where none is, since all its numbers may be given in its place."""
    if cluster.gpu is None:
        return None
    if cluster.gpu not in GPUS:
        raise UserError(
            f"no GPU is known as {cluster.gpu}; choose one of {', '.join(GPUS)}, or leave --gpu out and give "
            "--memory-gib, --tflops, --memory-bandwidth and --intra-bandwidth"
        )
    if GPUS[cluster.gpu].peak(precision) is None and cluster.tflops is None:
        raise UserError(f"{cluster.gpu} has no units for {precision}; set --training.precision fp32, or give --tflops")
    return GPUS[cluster.gpu]


def _rate(option: str, given: float | None, unit: float, of_gpu: float | None) -> float:
    """What is given, in its unit, or else what the GPU has."""
    if given is None and of_gpu is None:
        raise UserError(f"--{option} is not known; give it, or name a GPU with --gpu")
    return of_gpu if given is None else given * unit
