"""Estimate memory, time and cost of a training run on a cluster, before there is one.

    ponder estimate --config examples/configs/llama_410m.yaml --gpu H100-SXM --nodes 2 --tokens 30e9
    ponder estimate --config FILE.yaml --gpu H100-SXM --gpus 64 --search
    ponder estimate --config FILE.yaml --cluster examples/clusters/h100.yaml --search
    ponder estimate --config FILE.yaml --nodes 4 --gpus-per-node 8 --memory-gib 80 --tflops 312 \\
        --memory-bandwidth 2039 --intra-bandwidth 300 --inter-bandwidth 25 --parallel.tensor 4

Keys of the configuration can be overridden as in training. What does not fit ends with exit code 2 and the nearest
layout that does.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from megatron_ponder.base.command_line import Parser
from megatron_ponder.base.errors import UserError, command
from megatron_ponder.base.paths import expand_user
from megatron_ponder.cluster.gpus import GPUS
from megatron_ponder.config import Config, read_config


@command
def main(argv: Sequence[str]) -> None:
    """Parse the command line, estimate, print."""
    parser = Parser("estimate", __doc__)
    parser.add_argument(
        "--config", type=expand_user, required=True, metavar="FILE", help="of the run; dotted keys override it"
    )
    parser.add_argument("--cluster", type=Path, metavar="FILE", help="a description in YAML, as in examples/clusters/")
    parser.add_argument("--gpu", metavar="NAME", help=f"one of {', '.join(GPUS)}")
    parser.add_argument("--gpus", type=int, metavar="N", help="in all, on full nodes or a part of one, for --nodes")
    parser.add_argument("--nodes", type=int)
    parser.add_argument("--gpus-per-node", type=int)
    parser.add_argument("--memory-gib", type=float, help="memory of a GPU")
    parser.add_argument("--tflops", type=float, help="peak of a GPU in the training precision, without sparsity")
    parser.add_argument("--memory-bandwidth", type=float, metavar="GB/S", help="of a GPU's memory")
    parser.add_argument("--intra-bandwidth", type=float, metavar="GB/S", help="of a GPU inside its node, one direction")
    parser.add_argument("--inter-bandwidth", type=float, metavar="GB/S", help="of a GPU to other nodes (default: 50)")
    parser.add_argument("--tokens", type=float, help="token budget; that of training.steps unless given")
    parser.add_argument("--search", action="store_true", help="rank the layouts that fit")
    parser.add_argument("--top", type=int, default=10, help="layouts to show (default: 10)")
    parser.add_argument("--json", action="store_true", help="one JSON object in place of tables")
    arguments, overrides = parser.parse_with_overrides(argv)

    config = read_config(["--config", arguments.config, *overrides])
    if config.model.vocab_size is None:
        raise UserError("the size of the vocabulary is the tokenizer's, which is not read here; add --model.vocab_size")
    # Imported here, so that a wrong configuration is answered at once.
    from megatron_ponder.cluster.hardware import read_description
    from megatron_ponder.estimates.search import fitting, plan_of

    names = ("gpu", "nodes", "gpus_per_node", "memory_gib", "tflops")
    names += ("memory_bandwidth", "intra_bandwidth", "inter_bandwidth")
    given = {name: getattr(arguments, name) for name in names}
    description = read_description(arguments.cluster, given)
    if arguments.gpus is not None:
        if arguments.nodes is not None:
            raise UserError("--gpus and --nodes both say how many GPUs there are; give one of them")
        description = description.of_gpus(arguments.gpus)
    cluster = description.cluster(config.training.precision)
    per_step = config.training.global_batch_size * config.data.sequence_length
    tokens = config.training.steps * per_step if arguments.tokens is None else arguments.tokens
    if tokens <= 0:
        raise UserError(f"--tokens is {tokens:g}; give a positive number, such as 30e9")
    console = Console(width=None if sys.stdout.isatty() else 118)
    if arguments.search:
        show_search(config, cluster, fitting(config, cluster), arguments, tokens, console)
        return
    plan = plan_of(config, cluster)
    if arguments.json:
        print(json.dumps(as_dict(plan, cluster, tokens)))
    else:
        show_plan(plan, cluster, tokens, console)
    if plan.memory.total > cluster.usable_memory:
        raise UserError(does_not_fit(plan, cluster, fitting(config, cluster)))


def show_plan(plan, cluster, tokens: float, console: Console) -> None:
    """Memory of every rank, and where the time of a step goes."""
    from megatron_ponder.estimates.layout_table import describe_layout

    print(_heading(cluster))
    print(describe_layout(plan.config, plan.data, cluster.device))
    print(
        f"of {cluster.memory / 2**30:.1f} GiB a GPU, {cluster.usable_memory / 2**30:.1f} are taken to be usable; the "
        f"fullest rank needs {plan.memory.total / 2**30:.2f}\n"
    )
    table = Table("a step", "seconds", "share")
    for column in table.columns[1:]:
        column.justify = "right"
    for name, seconds in plan.time.parts.items():
        table.add_row(name, f"{seconds:.4f}", f"{seconds / plan.time.total:.1%}")
    table.add_section()
    table.add_row("together", f"{plan.time.total:.4f}", "100.0%")
    console.print(table)
    if plan.time.collectives:
        kinds = sorted(plan.time.collectives.items(), key=lambda item: -item[1])
        shown = ", ".join(f"{axis} {operation} {seconds:.4f}" for (axis, operation), seconds in kinds)
        print(f"communication in seconds a step: {shown}; {plan.time.hidden:.4f} of it hidden behind computation")
    rate = plan.time.tokens_per_second
    days = tokens / rate / 86400
    print(
        f"{rate:,.0f} tokens/s, MFU {plan.time.utilisation(cluster):.1%}; {tokens:.3g} tokens take {days:,.2f} days, "
        f"{days * 24 * cluster.ranks:,.0f} GPU-hours"
    )


def show_search(config: Config, cluster, plans: list, arguments: argparse.Namespace, tokens: float, console) -> None:
    """The fastest layouts that fit.

    Raises:
        UserError: if none does.
    """
    from megatron_ponder.estimates.search import changes, flags, plan_of

    if not plans:
        plan_of(config, cluster)  # says why, if ranks or batch do not divide
        raise UserError(nothing_fits(cluster))
    if arguments.json:
        print(json.dumps([as_dict(plan, cluster, tokens) for plan in plans[: arguments.top]]))
        return
    print(_heading(cluster))
    usable = f"{cluster.usable_memory / 2**30:.1f} of {cluster.memory / 2**30:.1f} GiB"
    headings = ("tensor", "pipeline", "data", "ZeRO", "recompute", "micro-batch", "GiB", "tokens/s", "MFU", "days")
    table = Table("", *headings, "GPU-hours", title=f"{len(plans):,} layouts fit into the usable {usable} of a GPU")
    for column in table.columns:
        column.justify = "right"
    shown = plans[: arguments.top]
    for number, plan in enumerate(shown, 1):
        parallel, training = plan.config.parallel, plan.config.training
        days = tokens / plan.time.tokens_per_second / 86400
        table.add_row(
            str(number),
            f"{parallel.tensor}{' + sequence' if parallel.sequence_parallel else ''}",
            str(parallel.pipeline),
            str(plan.data),
            str(parallel.zero_stage),
            training.recompute,
            str(training.micro_batch_size),
            f"{plan.memory.total / 2**30:.1f}",
            f"{plan.time.tokens_per_second:,.0f}",
            f"{plan.time.utilisation(cluster):.1%}",
            f"{days:,.2f}",
            f"{days * 24 * cluster.ranks:,.0f}",
        )
    console.print(table)
    for number, plan in enumerate(shown, 1):  # in lines of their own, to be copied
        print(f"{number}: {flags(changes(config, plan.config)) or 'the layout of the configuration'}")


def does_not_fit(plan, cluster, plans: list) -> str:
    """One line with the nearest layout that does."""
    from megatron_ponder.estimates.search import changes, flags, nearest

    found = nearest(plan.config, plans)
    if found is None:
        return nothing_fits(cluster)
    return (
        f"{plan.memory.total / 2**30:.1f} GiB on the fullest rank do not fit into {cluster.usable_memory / 2**30:.1f}; "
        f"add {flags(changes(plan.config, found.config))}, which needs {found.memory.total / 2**30:.1f} GiB and makes "
        f"{found.time.tokens_per_second:,.0f} tokens/s"
    )


def nothing_fits(cluster) -> str:
    """One line for a model that is too large."""
    return (
        f"no layout of this model fits into {cluster.usable_memory / 2**30:.1f} GiB on each of {cluster.ranks} ranks; "
        "use more nodes, or offload the optimiser with --parallel.zero_stage 3 --parallel.offload_optimizer cpu"
    )


def as_dict(plan, cluster, tokens: float) -> dict:
    """A plan as JSON knows it."""
    from megatron_ponder.estimates.search import KEYS

    seconds = tokens / plan.time.tokens_per_second
    return {
        **{f"{section}.{key}": getattr(getattr(plan.config, section), key) for section, key in KEYS},
        "data": plan.data,
        "ranks": cluster.ranks,
        "fits": plan.memory.total <= cluster.usable_memory,
        "memory": {**vars(plan.memory), "total": plan.memory.total},
        "usable_memory": cluster.usable_memory,
        "step_seconds": plan.time.total,
        "parts": plan.time.parts,
        "collectives": {" ".join(key): value for key, value in plan.time.collectives.items()},
        "hidden": plan.time.hidden,
        "tokens_per_second": plan.time.tokens_per_second,
        "mfu": plan.time.utilisation(cluster),
        "tokens": tokens,
        "days": seconds / 86400,
        "gpu_hours": seconds / 3600 * cluster.ranks,
    }


def _heading(cluster) -> str:
    """What the cluster is taken to be."""
    nodes = "1 node" if cluster.nodes == 1 else f"{cluster.nodes} nodes"
    return (
        f"{nodes} of {cluster.gpus_per_node} {cluster.name}: "
        f"{cluster.peak / 1e12:,.0f} TFLOP/s (reached: {cluster.matrix_share:.0%} in products, "
        f"{cluster.attention_share:.0%} in attention), memory {cluster.memory_bandwidth / 1e9:,.0f} GB/s, "
        f"links {cluster.intra_bandwidth / 1e9:,.0f} GB/s in a node and {cluster.inter_bandwidth / 1e9:,.0f} between "
        "nodes, a GPU"
    )
