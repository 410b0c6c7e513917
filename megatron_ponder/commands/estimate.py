"""Estimate memory, time and cost of a training run on a cluster, before there is one.

    ponder estimate --config examples/configs/llama_410m.yaml --gpu H100-SXM --nodes 2 --tokens 30e9
    ponder estimate --config FILE.yaml --gpu H100-SXM --gpus 64 --search
    ponder estimate --config FILE.yaml --cluster examples/clusters/h100.yaml --search
    ponder estimate --config FILE.yaml --dry-run 1024 --parallel.tensor 8 --parallel.pipeline 4
    ponder estimate --config FILE.yaml --gpu H100-SXM --decoding
    ponder estimate --config FILE.yaml --nodes 4 --gpus-per-node 8 --memory-gib 80 --tflops 312 \\
        --memory-bandwidth 2039 --intra-bandwidth 300 --inter-bandwidth 25 --parallel.tensor 4

Keys of the configuration can be overridden as in training. What does not fit ends with exit code 2 and the nearest
layout that does. --dry-run starts ranks of a run one after another, here and without the others, in a narrow model, and
takes a step, so that what would fail on so many ranks fails before a job waits for them. --decoding says what a forward
of generation on one GPU cannot be faster than.
"""

import argparse
import json
import sys
from collections.abc import Sequence

from rich.console import Console

from megatron_ponder.base.command_line import Parser
from megatron_ponder.base.errors import UserError, command
from megatron_ponder.base.paths import expand_user
from megatron_ponder.cluster.hardware import Hardware, hardware_of
from megatron_ponder.cluster.machine_options import add_machine_options, chosen_cluster, described_cluster
from megatron_ponder.config import Config, read_config, training_phases
from megatron_ponder.config.batch_sizes import samples_of
from megatron_ponder.config.command_options import Number
from megatron_ponder.config.declarations import Range
from megatron_ponder.estimates.budget import TOKENS, Budget
from megatron_ponder.hf.starting_point import complete


@command
def main(argv: Sequence[str]) -> None:
    """Parse the command line, estimate, print."""
    parser = Parser("estimate", __doc__)
    parser.add_argument(
        "--config", type=expand_user, required=True, metavar="FILE", help="of the run; dotted keys override it"
    )
    parser.add_argument("--tokens", type=TOKENS, help="token budget; that of training.steps unless given")
    parser.add_argument(
        "--mean-latent-steps",
        type=Number("mean_latent_steps", float, Range(0, 10**6)),
        metavar="K",
        help="of a token once training prunes; its budget, or K / 2",
    )
    parser.add_argument("--search", action="store_true", help="rank the layouts that fit")
    parser.add_argument("--decoding", action="store_true", help="the least time of generation's forwards on one GPU")
    parser.add_argument(
        "--top", type=Number("top", int, Range(1, 10**6)), default=10, help="layouts to show (default: 10)"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object in place of tables")
    parser.add_argument(
        "--dry-run",
        type=Number("dry_run", int, Range(1, 10**7)),
        metavar="RANKS",
        help="start those of so many ranks that differ, and take a step of each",
    )
    add_machine_options(parser)
    arguments, overrides = parser.parse_with_overrides(argv)

    config = read_config(complete(["--config", arguments.config, *overrides]))
    if config.model.vocab_size is None:
        raise UserError("the size of the vocabulary is the tokenizer's, which is not read here; add --model.vocab_size")
    if arguments.dry_run is not None:
        _dry_run(config, arguments)
        return
    if arguments.decoding:
        _show_decoding(config, arguments)
        return
    show = _show_search if arguments.search else _show_plan
    show(config, _hardware(arguments, config), arguments)


def _show_plan(config: Config, hardware: Hardware, arguments: argparse.Namespace) -> None:
    """Print memory and time of the layout that is configured, of each of the run's phases.

    Raises:
        UserError: it does not fit; names the nearest that does.
    """
    from megatron_ponder.estimates import plan_tables, search  # now, so that a wrong configuration is answered at once

    phases, budgets = training_phases(config), _budgets(arguments, config)
    plans = [search.plan_of(phase.config, hardware) for phase in phases]
    if arguments.json:
        found = [plan_tables.as_dict(*each) for each in zip(plans, [hardware] * len(plans), budgets, strict=True)]
        print(json.dumps(found if len(found) > 1 else found[0]))
    else:
        print(plan_tables.heading(hardware))
        spent = []
        for phase, plan, budget in zip(phases, plans, budgets, strict=True):
            if len(phases) > 1:
                print(f"\nsteps {phase.first_step:,} to {phase.last_step:,}:")
            print(plan_tables.memory_lines(plan, hardware))
            spent.append(plan_tables.spent(plan, hardware, budget))
            _console().print(plan_tables.time_table(plan))
            print(plan_tables.time_lines(plan, hardware, budget, spent[-1]))
            if len(spent[-1]) > 1:
                _console().print(plan_tables.phase_table(spent[-1]))
        if len(phases) > 1:
            print(plan_tables.total_line(spent, hardware))
    for phase, plan in zip(phases, plans, strict=True):
        if plan.memory.total > hardware.usable_memory:
            raise UserError(plan_tables.does_not_fit(plan, hardware, search.fitting(phase.config, hardware)))


def _show_search(config: Config, hardware: Hardware, arguments: argparse.Namespace) -> None:
    """Print the fastest layouts that fit.

    Raises:
        UserError: none does, or the run has phases.
    """
    if config.training.phases:
        raise UserError(
            "--search ranks layouts for one phase, and training.phases has several; leave it out, and give the keys of "
            "the phase that is asked for, such as --data.sequence_length"
        )
    from megatron_ponder.estimates import plan_tables, search

    (budget,) = _budgets(arguments, config)

    plans = search.fitting(config, hardware)
    if not plans:
        search.plan_of(config, hardware)  # says why, if ranks or batch do not divide
        raise UserError(plan_tables.nothing_fits(hardware))
    shown = plans[: arguments.top]
    if arguments.json:
        print(json.dumps([plan_tables.as_dict(plan, hardware, budget) for plan in shown]))
        return
    print(plan_tables.heading(hardware))
    _console().print(plan_tables.search_table(plans, arguments.top, hardware, budget))
    for number, plan in enumerate(shown, 1):  # in lines of their own, to be copied
        changed = search.flags(search.changes(config, plan.config))
        print(f"{number}: {changed or 'the layout of the configuration'}")


def _show_decoding(config: Config, arguments: argparse.Namespace) -> None:
    """Print what forwards of generation cannot be faster than.

    Raises:
        UserError: something else is asked for, too.
    """
    for name in ("search", "json", "tokens", "mean_latent_steps"):
        if _given(arguments, name):
            raise UserError(f"--{name.replace('_', '-')} and --decoding are two questions; leave one out")
    from megatron_ponder.estimates import decoding_floor

    hardware = _hardware(arguments, config)
    _console().print(decoding_floor.decoding_table(decoding_floor.decoding_floors(config, hardware), hardware))


def _dry_run(config: Config, arguments: argparse.Namespace) -> None:
    """Print what ranks of a run find at their start.

    Raises:
        UserError: the layout cannot work on so many ranks, or the fullest does not fit into a GPU that is named.
    """
    for name in ("search", "decoding", "json", "tokens", "mean_latent_steps", "gpus", "nodes"):
        if _given(arguments, name):
            raise UserError(f"--{name.replace('_', '-')} and --dry-run are two questions; leave one out")
    from megatron_ponder.base.launch import Launch
    from megatron_ponder.training import rehearsal

    cluster = described_cluster(arguments).of_gpus(arguments.dry_run)
    launch = Launch(world_size=arguments.dry_run, local_size=cluster.ranks)
    console = _console()
    for phase in training_phases(config):
        found = list(rehearsal.rehearse(phase.config, launch))
        console.print(rehearsal.rehearsal_table(phase.config, launch.world_size, found))
    if cluster.gpu is not None or cluster.memory_gib is not None:
        _show_plan(config, hardware_of(cluster, config.training.precision), arguments)


def _given(arguments: argparse.Namespace, name: str) -> bool:
    """Whether an option is there; 0 is a value like any other."""
    value = getattr(arguments, name)
    return value is not None and value is not False


def _console() -> Console:
    return Console(width=None if sys.stdout.isatty() else 118)


def _hardware(arguments: argparse.Namespace, config: Config) -> Hardware:
    """What the file and the options describe, in the precision of training."""
    return hardware_of(chosen_cluster(arguments), config.training.precision)


def _budgets(arguments: argparse.Namespace, config: Config) -> list[Budget]:
    """What each phase of the run is given."""
    mean, phases = arguments.mean_latent_steps, training_phases(config)
    if mean is not None:
        _check_mean(mean, config)
    if arguments.tokens is not None:
        if len(phases) > 1:
            raise UserError(
                "--tokens is a budget for one phase, and training.phases has several; set training.steps to what the "
                "run is to take"
            )
        return [Budget(arguments.tokens, mean)]
    budgets, before = [], 0
    for phase in phases:
        own = samples_of(phase.config.training, phase.last_step - phase.first_step, before)
        budgets.append(Budget(own * phase.config.data.sequence_length, mean, phase.first_step, before))
        before += own
    return budgets


def _check_mean(mean: float, config: Config) -> None:
    """Raise unless tokens may have so many latent steps in the mean, and it matters."""
    from megatron_ponder.estimates.phases import packs

    if not packs(config):
        raise UserError(
            "--mean-latent-steps is for runs that come to leave out slots, and this one runs all; set "
            "ponder_training.prune_start, and leave ponder_training.packed true"
        )
    if mean > config.ponder.steps:
        raise UserError(f"--mean-latent-steps is {mean:g}; give a number from 0 to latent_steps, {config.ponder.steps}")
