"""Options of commands that plan for a cluster: a file that describes it, or what they say themselves."""

import argparse
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from megatron_ponder.base.errors import UserError
from megatron_ponder.cluster.description import Cluster, Machines, read_cluster
from megatron_ponder.cluster.gpus import GPUS
from megatron_ponder.config.command_options import Number, add_options
from megatron_ponder.config.declarations import Range

MACHINES = [item.name for item in fields(Machines)]


def add_machine_options(parser: argparse.ArgumentParser) -> None:
    """Add `--cluster`, `--gpus` and an option for each field of `Machines`, whose defaults are the file's."""
    where = parser.add_argument_group("cluster", f"GPUs that are known: {', '.join(GPUS)}")
    where.add_argument(
        "--cluster", type=Path, metavar="FILE", help="a description in YAML, which ponder submit reads too"
    )
    in_all = Number("gpus", int, Range(1, 10**7))
    where.add_argument("--gpus", type=in_all, metavar="N", help="in all, on full nodes or a part of one, for --nodes")
    add_options(where, Machines)
    parser.set_defaults(**dict.fromkeys(MACHINES))  # what is not given is the file's


def described_cluster(arguments: argparse.Namespace) -> Cluster:
    """What the file and the options describe, but for `--gpus`."""
    given = {name: getattr(arguments, name) for name in MACHINES if getattr(arguments, name) is not None}
    if arguments.cluster is not None:
        given = {"cluster": arguments.cluster} | given
    return read_cluster([f"--{name}={value}" for name, value in given.items()])


def chosen_cluster(arguments: argparse.Namespace) -> Cluster:
    """What the file and the options describe, with so many GPUs as are asked for.

    Raises:
        UserError: the number of GPUs is given twice.
    """
    cluster = described_cluster(arguments)
    if arguments.gpus is None:
        return cluster
    if arguments.nodes is not None:
        raise UserError("--gpus and --nodes both say how many GPUs there are; give one of them")
    return cluster.of_gpus(arguments.gpus)


def machine_words(arguments: argparse.Namespace) -> Sequence[str]:
    """The options as they were given, for a command line that plans for the same cluster."""
    names = ["cluster", "gpus", *MACHINES]
    given = {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}
    return [
        word
        for name, value in given.items()
        for word in (f"--{name.replace('_', '-')}", f"{value:g}" if isinstance(value, float) else f"{value}")
    ]
