"""Train every way of spending compute on the same tokens, and draw loss against compute.

    python examples/pareto/pareto.py --size cpu --output runs/pareto --jobs 2

Size `diagnostic` does it on text whose difficulty is known, and adds depths.md: loss and steps by true depth.

The same command goes on where it was stopped; what is finished is not done again. The output then holds the runs, an
analysis of each seed with its figures and its page, and over all seeds table.md, table.csv, refinements.md, and a
figure of the loss against each cost: FLOPs, KV entries and measured time of inference, FLOPs and measured time of
training. With --compare costs it is ways of training a model more cheaply that are compared. With --dry-run the
configuration of every run is checked and its command printed, and nothing is started.
"""

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path

from costs import write_costs
from generation_times import measure_generation
from loss_figures import write_figures
from pieces import GPU, START, cut, estimated_seconds, train_for
from refinement_tables import write_refinements
from rich.console import Console
from runs import COMPARISONS, SIZES, Run, analyse, plan_runs, prepare_data, train
from tables import write_tables

from megatron_ponder.base.errors import UserError, command
from megatron_ponder.config import read_config

PIECE = 8.0  # minutes, of what --dry-run shows of size gpu


@command
def main(argv: Sequence[str]) -> None:
    """Make the data, train, measure, write tables and figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="cpu", help="configuration (default: cpu)")
    parser.add_argument(
        "--compare",
        choices=COMPARISONS,
        default="variants",
        help="what is compared: ways of spending compute, or what training costs (default: variants)",
    )
    parser.add_argument("--output", type=Path, required=True, help="folder for everything that is made")
    parser.add_argument("--data", type=Path, help="folder of corpus and tokenizer; data/ in the output unless given")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="(default: 0 1 2)")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time (default: 1)")
    parser.add_argument("--samples", type=int, default=32, help="validation samples of the analysis (default: 32)")
    parser.add_argument(
        "--generation-rounds",
        type=int,
        default=3,
        help="measurements of how long each model takes to generate; 0 for none (default: 3)",
    )
    parser.add_argument(
        "--minutes",
        type=float,
        help="of size gpu: begin no run that would end later by estimate; the same command goes on (default: no limit)",
    )
    parser.add_argument("--dry-run", action="store_true", help="check and print the commands, and start nothing")
    arguments = parser.parse_args(argv)
    data = arguments.data or arguments.output / "data"
    runs = plan_runs(arguments.size, arguments.output, data, arguments.seeds, arguments.compare)
    if arguments.minutes is not None and arguments.size != "gpu":
        raise UserError("--minutes cuts size gpu, whose times `ponder estimate` knows; leave it out")
    if arguments.dry_run:
        _print(runs, arguments)
        return
    prepare_data(arguments.size, data)
    if not _train(runs, arguments):
        return
    folders = {seed: arguments.output / f"seed{seed}" for seed in arguments.seeds}
    parts = {folder: [run for run in runs if run.seed == seed] for seed, folder in folders.items()}
    analyse(parts, data, arguments.samples, arguments.jobs)
    if arguments.compare == "costs":
        table = write_costs(runs, folders, arguments.output)
    else:
        table = write_tables(folders, arguments.output)
    if refined := write_refinements(folders, arguments.output):
        table += "\n" + refined
    times = measure_generation(runs, arguments.output / "generation.jsonl", arguments.generation_rounds)
    write_figures(runs, folders, times, arguments.output, modes=arguments.compare == "variants")
    Console(highlight=False).print(table, soft_wrap=True)


def _train(runs: list[Run], arguments: argparse.Namespace) -> bool:
    """Train what fits into the time that there is; whether nothing is left, and there is time to measure."""
    if arguments.minutes is None:
        train(runs, arguments.jobs)
        return True
    begun = not all(run.finished for run in runs)
    seconds = estimated_seconds(runs, arguments.size)
    left = train_for(runs, seconds, 60 * arguments.minutes, arguments.jobs, train)
    if left or begun:
        print(f"{left or 'no'} runs are left: the same command {'goes on' if left else 'measures them'}")
    return not (left or begun)


def _print(runs: list[Run], arguments: argparse.Namespace) -> None:
    """Check the configuration of every run and print its command; of size gpu in pieces."""
    for run in runs:
        read_config(run.arguments)  # refuses what is wrong
    pieces, minutes = [runs], {}
    if arguments.size == "gpu":
        seconds = estimated_seconds(runs, arguments.size)
        minutes = {run.folder: needed / 60 for run, needed in zip(runs, seconds, strict=True)}
        pieces = cut(runs, seconds, 60 * (arguments.minutes or PIECE))
    for number, piece in enumerate(pieces, 1):
        if minutes:
            needed = sum(minutes[run.folder] for run in piece)
            print(
                f"# piece {number}: {needed:.1f} minutes of one {GPU} by estimate, {START:.0f} s of each run its start"
            )
        for run in piece:
            print(shlex.join(["ponder", "train", *run.arguments]))


if __name__ == "__main__":
    main()
