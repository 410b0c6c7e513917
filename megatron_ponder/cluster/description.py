"""What a user says about a cluster, once, and what is wrong with it."""

import argparse
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from itertools import pairwise
from pathlib import Path
from typing import Literal

import yaml

from megatron_ponder.errors import UserError

# Minutes, minutes:seconds, hours:minutes:seconds, days-hours, days-hours:minutes, days-hours:minutes:seconds.
TIME = re.compile(r"\d+(:\d+){0,2}|\d+-\d+(:\d+){0,2}")


@dataclass(frozen=True)
class Cluster:
    """A cluster, and the part of it that a job asks for.

    Attributes:
        account: to charge; the user's default unless given.
        partition: the cluster's default unless given.
        nodes: number of nodes.
        gpus_per_node: 0 on a cluster of CPUs.
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
    nodes: int = 1
    gpus_per_node: int = 8
    ranks_per_node: int | None = None
    cpus_per_node: int | None = None
    time: str = "24:00:00"
    signal_seconds: int = 300
    modules: list[str] = field(default_factory=list)
    venv: str | None = None
    container: str | None = None
    container_runtime: Literal["pyxis", "apptainer"] = "pyxis"
    container_mounts: list[str] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)
    sbatch: list[str] = field(default_factory=list)
    log_folder: str = "runs/slurm"

    @property
    def ranks(self) -> int:
        """Processes that train on each node."""
        return self.ranks_per_node or self.gpus_per_node


def read_cluster(arguments: Sequence[str]) -> Cluster:
    """The cluster that `--cluster FILE.yaml` and any number of `--key value` describe; later ones win.

    Raises:
        UserError: on anything unknown, mistyped or impossible.
    """
    import jsonargparse

    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--cluster", action="config")
    parser.add_class_arguments(Cluster, nested_key=None, fail_untyped=True)
    _check_names(arguments)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # deprecations that jsonargparse announces to library authors
            parsed = parser.parse_args(list(arguments))
    except (argparse.ArgumentError, jsonargparse.ArgumentError, TypeError, yaml.YAMLError) as error:
        raise UserError(f"the description of the cluster: {' '.join(str(error).split())}") from error
    return _checked(Cluster(**{item.name: getattr(parsed, item.name) for item in fields(Cluster)}))


def _check_names(arguments: Sequence[str]) -> None:
    """Refuse a file that is missing or has keys that are not those of a cluster, which are listed."""
    names = [item.name for item in fields(Cluster)]
    given = {argument[2:].partition("=")[0]: "among the options" for argument in arguments if argument[:2] == "--"}
    files = [value for key, value in pairwise(arguments) if key == "--cluster"]
    files += [argument.partition("=")[2] for argument in arguments if argument.startswith("--cluster=")]
    for file in files:
        if not Path(file).is_file():
            raise UserError(f"there is no description of a cluster in {file}; begin with examples/slurm/cluster.yaml")
        try:
            content = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise UserError(f"{file} is not valid YAML: {' '.join(str(error).split())}") from error
        if not isinstance(content, dict):
            raise UserError(f"{file} must hold keys such as `partition: gpu`")
        given |= dict.fromkeys(content, f"in {file}")
    for name, where in given.items():
        if name != "cluster" and name.partition(".")[0] not in names:
            raise UserError(f"a cluster has no {name} ({where}); it has {', '.join(names)}")


def _checked(cluster: Cluster) -> Cluster:
    """Refuse what no cluster can do."""
    if cluster.nodes < 1 or cluster.gpus_per_node < 0:
        raise UserError(f"nodes {cluster.nodes}, gpus_per_node {cluster.gpus_per_node}: ask for at least one node")
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
        raise UserError(f"time {cluster.time} is no time limit; write HH:MM:SS or D-HH:MM:SS, in quotes in a file")
    if cluster.signal_seconds < 1:
        raise UserError(f"signal_seconds {cluster.signal_seconds}: a job needs time to save before its limit")
    if cluster.venv is not None and cluster.container is not None:
        raise UserError("venv and container are two ways to the same end; give one of them")
    if cluster.venv is not None and not Path(cluster.venv, "bin", "activate").is_file():
        raise UserError(f"venv {cluster.venv} is no virtual environment: it has no bin/activate")
    _check_words(cluster)
    return cluster


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
