"""A cluster on paper: what its GPUs, nodes and links can do."""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path

from megatron_ponder.base.errors import UserError
from megatron_ponder.base.yaml_files import read_mapping
from megatron_ponder.cluster.gpus import GIGA, GPUS, TERA

GIB = 2**30


@dataclass(frozen=True)
class Cluster:
    """What a cluster is taken to be.

    The shares say how much of a peak real kernels reach. Their defaults are round numbers in the middle of what is
    reported for large layers in bf16: 0.7 for products, 0.45 for forward and backward of FlashAttention-2 (Dao, 2023,
    section 4; lower on Hopper), 0.8 for rings of NCCL and for kernels that only move memory. Whoever has measured
    better ones writes them into the description.

    Attributes:
        name: of the GPU.
        nodes: machines.
        gpus_per_node: ranks of each.
        memory: bytes of a GPU.
        peak: FLOP/s of a GPU in the precision of training.
        memory_bandwidth: bytes/s.
        intra_bandwidth: bytes/s that a GPU sends to others of its node.
        inter_bandwidth: bytes/s that a GPU sends to other nodes, when all of its node send.
        intra_latency, inter_latency: seconds until a message starts to arrive.
        matrix_share: of the peak, in products with weights.
        attention_share: of the peak, in attention.
        memory_bandwidth_share: of the memory's bandwidth, in element-wise operations.
        link_share: of the links' bandwidths, in collectives.
        memory_share: of the memory, for the tensors that are counted; the rest is for CUDA, NCCL and gaps.
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
    intra_latency: float = 10e-6
    inter_latency: float = 20e-6
    matrix_share: float = 0.7
    attention_share: float = 0.45
    memory_bandwidth_share: float = 0.8
    link_share: float = 0.8
    memory_share: float = 0.9
    device: str = "cuda"

    @property
    def ranks(self) -> int:
        """One for each GPU."""
        return self.nodes * self.gpus_per_node

    @property
    def usable_memory(self) -> float:
        """Bytes of a GPU that tensors may take."""
        return self.memory * self.memory_share


@dataclass(frozen=True)
class ClusterDescription:
    """A cluster as users write it, in YAML or as flags; what is left out is the named GPU's.

    Attributes:
        gpu: a name of `cluster/gpus.py`.
        nodes: machines.
        gpus_per_node: of each.
        memory_gib: memory of a GPU.
        tflops: its peak in the precision of training.
        memory_bandwidth: its memory's, GB/s.
        intra_bandwidth: from a GPU to others of its node, GB/s in one direction.
        inter_bandwidth: from a GPU to other nodes, GB/s in one direction: that of a node's network, divided by its
            GPUs. 400 Gbit/s for each GPU are 50.
        intra_latency_us, inter_latency_us: microseconds.
        matrix_share, attention_share, memory_bandwidth_share, link_share, memory_share: as in `Cluster`.
    """

    gpu: str | None = None
    nodes: int = 1
    gpus_per_node: int = 8
    memory_gib: float | None = None
    tflops: float | None = None
    memory_bandwidth: float | None = None
    intra_bandwidth: float | None = None
    inter_bandwidth: float = 50.0
    intra_latency_us: float = 10.0
    inter_latency_us: float = 20.0
    matrix_share: float = Cluster.matrix_share
    attention_share: float = Cluster.attention_share
    memory_bandwidth_share: float = Cluster.memory_bandwidth_share
    link_share: float = Cluster.link_share
    memory_share: float = Cluster.memory_share

    def of_gpus(self, gpus: int) -> "ClusterDescription":
        """The same with so many GPUs in all: on full nodes, or on a part of one.

        Raises:
            UserError: they do not fill their nodes.
        """
        if gpus < 1:
            raise UserError(f"--gpus is {gpus}; give at least 1")
        if gpus < self.gpus_per_node:
            return replace(self, nodes=1, gpus_per_node=gpus)
        if gpus % self.gpus_per_node:
            full = gpus - gpus % self.gpus_per_node
            raise UserError(
                f"{gpus} GPUs do not fill nodes of {self.gpus_per_node}; ask for {full} or "
                f"{full + self.gpus_per_node}, or give --gpus-per-node"
            )
        return replace(self, nodes=gpus // self.gpus_per_node)

    def cluster(self, precision: str) -> Cluster:
        """The cluster, for training in this precision.

        Raises:
            UserError: for an unknown GPU, a number that is missing, or one that cannot be.
        """
        gpu = None if self.gpu is None else GPUS.get(self.gpu)
        if self.gpu is not None and gpu is None:
            raise UserError(
                f"no GPU is known as {self.gpu}; choose one of {', '.join(GPUS)}, or leave --gpu out and give "
                "--memory-gib, --tflops, --memory-bandwidth and --intra-bandwidth"
            )
        if gpu is not None and gpu.peak(precision) is None and self.tflops is None:
            raise UserError(f"{self.gpu} has no units for {precision}; set --training.precision fp32, or give --tflops")
        memory_gib = gpu.memory * GIGA / GIB if gpu and self.memory_gib is None else self.memory_gib
        needed = {
            "memory-gib": memory_gib,
            "tflops": gpu.peak(precision) / TERA if gpu and self.tflops is None else self.tflops,
            "memory-bandwidth": gpu.memory_bandwidth / GIGA
            if gpu and not self.memory_bandwidth
            else self.memory_bandwidth,
            "intra-bandwidth": gpu.link / GIGA if gpu and self.intra_bandwidth is None else self.intra_bandwidth,
        }
        for name, value in needed.items():
            if value is None:
                raise UserError(f"--{name} is not known; give it, or name a GPU with --gpu")
        for name, value in {**vars(self), **{name.replace("-", "_"): value for name, value in needed.items()}}.items():
            share = name.endswith("_share")
            if name != "gpu" and not (0 < value <= 1 if share else value > 0):
                raise UserError(f"{name} is {value}; it must be {'a share between 0 and 1' if share else 'positive'}")
        return Cluster(
            name=self.gpu or "GPU",
            nodes=self.nodes,
            gpus_per_node=self.gpus_per_node,
            memory=memory_gib * GIB,
            peak=needed["tflops"] * TERA,
            memory_bandwidth=needed["memory-bandwidth"] * GIGA,
            intra_bandwidth=needed["intra-bandwidth"] * GIGA,
            inter_bandwidth=self.inter_bandwidth * GIGA,
            intra_latency=self.intra_latency_us * 1e-6,
            inter_latency=self.inter_latency_us * 1e-6,
            **{field.name: getattr(self, field.name) for field in fields(self) if field.name.endswith("_share")},
        )


def read_description(path: Path | None, overrides: Mapping[str, object]) -> ClusterDescription:
    """The description in a YAML file, or an empty one, with flags of a command line over it.

    Args:
        path: the file; None for none.
        overrides: values by key; None stands for a flag that was not given.

    Raises:
        UserError: if the file is not a mapping of known keys to values of their kinds.
    """
    holds = "keys such as `gpu: H100-SXM`; examples/clusters/ has files to start from"
    content = {} if path is None else read_mapping(path, holds)
    known = {field.name: field.type for field in fields(ClusterDescription)}
    for key, value in content.items():
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}"
            raise UserError(f"{path}: unknown key {key}; {hint}")
        wanted = str if key == "gpu" else int if key in ("nodes", "gpus_per_node") else (int, float)
        if not isinstance(value, wanted) or isinstance(value, bool):
            raise UserError(f"{path}: {key} is {value!r}; give a {'name' if key == 'gpu' else 'number'}")
    return ClusterDescription(**content | {key: value for key, value in overrides.items() if value is not None})
