"""What a user says about a cluster, once, for jobs and for estimates, and what is wrong with it."""

import argparse
import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Literal

from megatron_ponder.base.errors import UserError
from megatron_ponder.base.paths import user_path
from megatron_ponder.base.typed_arguments import content_of, options_of, parse, parser_of
from megatron_ponder.base.yaml_files import TextLoader, read_mapping
from megatron_ponder.config.declarations import SECONDS, check_ranges, expand_paths, number_field, path_field

# Minutes, minutes:seconds, hours:minutes:seconds, days-hours, days-hours:minutes, days-hours:minutes:seconds.
TIME = re.compile(r"\d+(:\d+){0,2}|\d+-\d+(:\d+){0,2}")


@dataclass(frozen=True)
class Machines:
    """The nodes of a cluster and what they can do, which estimates ask; of the rates, what is left out is the GPU's.

    The shares say how much of a peak real kernels reach. Their defaults are round numbers in the middle of what is
    reported for large layers in bf16: 0.7 for products, 0.45 for forward and backward of FlashAttention-2 (Dao, 2023,
    section 4; lower on Hopper), 0.8 for rings of NCCL and for kernels that only move memory. Whoever has measured
    better ones writes them into the description.

    Attributes:
        gpu: kind of GPU, a name of `cluster/gpus.py`.
        nodes: number of nodes.
        gpus_per_node: GPUs of each node; 0 on a cluster of CPUs.
        memory_gib: memory of a GPU.
        tflops: peak of a GPU in the precision of training, without sparsity.
        memory_bandwidth: GB/s of a GPU's memory.
        intra_bandwidth: GB/s from a GPU to others of its node, in one direction.
        inter_bandwidth: GB/s from a GPU to other nodes, in one direction: that of a node's network, divided by its
            GPUs. 400 Gbit/s for each GPU are 50.
        intra_latency_us: microseconds until a message inside a node starts to arrive.
        inter_latency_us: microseconds until a message between nodes starts to arrive.
        matrix_share: share of the peak that products with weights reach.
        attention_share: share of the peak that attention reaches.
        memory_bandwidth_share: share of the memory's bandwidth that element-wise operations reach.
        link_share: share of the links' bandwidths that collectives reach.
        memory_share: share of the memory for the tensors that are counted; the rest is for CUDA, NCCL and gaps.
    """

    gpu: str | None = None
    nodes: int = number_field(1, 1, 10**6)
    gpus_per_node: int = number_field(8, 0, 10**4)
    memory_gib: float | None = number_field(None, 0, 10**6, above=True)
    tflops: float | None = number_field(None, 0, 10**6, above=True)
    memory_bandwidth: float | None = number_field(None, 0, 10**6, above=True)
    intra_bandwidth: float | None = number_field(None, 0, 10**6, above=True)
    inter_bandwidth: float = number_field(50.0, 0, 10**6, above=True)
    intra_latency_us: float = number_field(10.0, 0, 10**6, above=True)
    inter_latency_us: float = number_field(20.0, 0, 10**6, above=True)
    matrix_share: float = number_field(0.7, 0, 1, above=True)
    attention_share: float = number_field(0.45, 0, 1, above=True)
    memory_bandwidth_share: float = number_field(0.8, 0, 1, above=True)
    link_share: float = number_field(0.8, 0, 1, above=True)
    memory_share: float = number_field(0.9, 0, 1, above=True)

    def of_gpus(self, gpus: int) -> "Machines":
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


@dataclass(frozen=True)
class Cluster(Machines):
    """A cluster, and the part of it that a job asks for.

    Attributes:
        account: to charge; the user's default unless given.
        partition: in which jobs run; the cluster's default unless given.
        ranks_per_node: processes that train on a node; one for each GPU unless given.
        cpus_per_node: cores of a node that its processes share; the cluster's default unless given.
        time: limit, as sbatch takes it.
        signal_seconds: how long before the limit a job is told to save and start again.
        modules: environment modules to load.
        venv: folder of the virtual environment with this package.
        container: image to run in, in place of a virtual environment.
        container_runtime: `pyxis` (srun --container-image) or `apptainer` (apptainer exec --nv).
        container_mounts: folders of the node to see inside, as the runtime writes them.
        environment: variables to set, such as NCCL_SOCKET_IFNAME.
        sbatch: any other options, written as for sbatch.
        log_folder: for what jobs print.
    """

    account: str | None = None
    partition: str | None = None
    ranks_per_node: int | None = number_field(None, 1, 10**4)
    cpus_per_node: int | None = number_field(None, 1, 10**5)
    time: str = "24:00:00"
    signal_seconds: int = number_field(300, 1, SECONDS)
    modules: list[str] = field(default_factory=list)
    venv: str | None = path_field(None)
    container: str | None = path_field(None)
    container_runtime: Literal["pyxis", "apptainer"] = "pyxis"
    container_mounts: list[str] = path_field([])
    environment: dict[str, str] = field(default_factory=dict)
    sbatch: list[str] = field(default_factory=list)
    log_folder: str = path_field("runs/slurm")

    @property
    def ranks(self) -> int:
        """Processes that train on each node."""
        return self.ranks_per_node or self.gpus_per_node


# What estimates read and jobs do not; a file may describe both.
OF_ESTIMATES = tuple(item.name for item in fields(Machines) if item.name not in ("nodes", "gpus_per_node"))


def read_cluster(arguments: Sequence[str], unread: Sequence[str] = ()) -> Cluster:
    """The cluster that `--cluster FILE.yaml` and any number of `--key value` describe; later ones win.

    Args:
        arguments: of a command line.
        unread: keys that the command does not read, so that as options they would be ignored.

    Raises:
        UserError: on anything unknown, unread, mistyped or out of its range.
    """
    rewritten = []
    for name, value in options_of(arguments):
        if name == "cluster":
            value = content_of(_read_file(user_path(value)))
        else:
            name = name.replace("-", "_")
            _check_name(name, "among the options")
            if name in unread:
                raise UserError(f"--{name} is read by ponder estimate alone and would change no job; leave it out")
        rewritten.append(f"--{name}={value}")
    cluster = expand_paths(parse(parser_of("submit", Cluster, "--cluster"), Cluster, rewritten))
    check_ranges(cluster)
    return cluster


def options_help() -> str:
    """Every key of a cluster that a job reads, as an option: what it is, its type and its default."""
    parser = parser_of("submit", Cluster, "--cluster")
    for action in parser._actions:
        if action.dest in OF_ESTIMATES:
            action.help = argparse.SUPPRESS
    return parser.format_help().partition("keys below.")[2].strip()


def check_cluster(cluster: Cluster) -> None:
    """Refuse a cluster on which no job could run.

    Raises:
        UserError: the first thing that cannot be.
    """
    if cluster.ranks < 1:
        raise UserError("without GPUs, say how many processes train on each node: set ranks_per_node")
    if cluster.gpus_per_node and cluster.ranks > cluster.gpus_per_node:
        raise UserError(
            f"ranks_per_node {cluster.ranks} is more than gpus_per_node {cluster.gpus_per_node}; each rank needs a GPU"
        )
    if cluster.cpus_per_node is not None and cluster.cpus_per_node < cluster.ranks:
        raise UserError(
            f"cpus_per_node {cluster.cpus_per_node} is fewer than the {cluster.ranks} ranks of a node; each needs one"
        )
    if not TIME.fullmatch(cluster.time):
        raise UserError(f"time {cluster.time} is no time limit; write HH:MM:SS or D-HH:MM:SS")
    if cluster.venv is not None and cluster.container is not None:
        raise UserError("venv and container are two ways to the same end; give one of them")
    if cluster.venv is not None and not Path(cluster.venv, "bin", "activate").is_file():
        raise UserError(f"venv {cluster.venv} is no virtual environment: it has no bin/activate")
    _check_words(cluster)


def _read_file(path: Path) -> dict:
    """What a file says about a cluster, refused where it has keys that are not those of one."""
    if not path.is_file():
        raise UserError(f"there is no description of a cluster in {path}; begin with examples/slurm/cluster.yaml")
    holds = "keys such as `nodes: 4` and `gpu: H100-SXM`"
    content, written = read_mapping(path, holds), read_mapping(path, holds, TextLoader)
    for name in content:
        _check_name(str(name), f"in {path}")
    # texts are what is written, whatever YAML would make of it: an account 007, a variable that is 1
    texts = {item.name for item in fields(Cluster) if "str" in str(item.type)}
    return {name: written[name] if name in texts else value for name, value in content.items()}


def _check_name(name: str, where: str) -> None:
    names = [item.name for item in fields(Cluster)]
    if re.split(r"[.+]", name)[0] not in names:
        near = difflib.get_close_matches(name, names, n=1)
        hint = f"did you mean {near[0]}?" if near else f"it has {', '.join(names)}"
        raise UserError(f"a cluster has no {name} ({where}); {hint}")


def _check_words(cluster: Cluster) -> None:
    """Refuse what would not stand in a script for what it is; all else is quoted there."""
    header = [cluster.account or "", cluster.partition or "", cluster.time, cluster.log_folder, *cluster.sbatch]
    arguments = [cluster.container or "", *cluster.container_mounts, *cluster.modules]
    for word in [*header, *arguments, cluster.venv or "", *cluster.environment, *cluster.environment.values()]:
        if re.search(r"[\x00-\x1f\x7f]", word):
            raise UserError(f"{word!r} has a line break or another control character; leave it out")
    for word in header:
        if "\\" in word:
            raise UserError(f'"{word}" has a backslash, which sbatch reads in its own way; leave it out')
    for word in arguments:
        if word.startswith("-"):
            raise UserError(f'"{word}" would be taken for an option; write the name of a module, an image or a folder')
    for name in cluster.environment:
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            raise UserError(f'environment has "{name}", which is no name of a variable')
    for option in cluster.sbatch:
        if not re.fullmatch(r"--[a-z][a-z0-9-]*(=.*)?", option):
            raise UserError(f'"{option}" is no long option of sbatch; write --name=value')
