"""Train every way of spending compute on the same tokens, and draw loss against compute.

    python examples/pareto/pareto.py --size cpu --output runs/pareto --jobs 2

Size `diagnostic` does it on text whose difficulty is known, and adds depths.md: loss and steps by true depth.

The same command goes on where it was stopped; what is finished is not done again. The output then holds the runs, an
analysis of each seed with its figures and its page, and over all seeds table.md, table.csv and pareto.png. With
--compare costs it is ways of training a model more cheaply that are compared, and costs.png has loss against operations
and time of training. With --dry-run the configuration of every run is checked and its command printed, and nothing is
started.
"""

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path

from costs import write_costs
from rich.console import Console
from runs import COMPARISONS, SIZES, analyse, plan_runs, prepare_data, train
from tables import write_tables

from megatron_ponder.base.errors import command
from megatron_ponder.config import read_config


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
    parser.add_argument("--dry-run", action="store_true", help="check and print the commands, and start nothing")
    arguments = parser.parse_args(argv)
    data = arguments.data or arguments.output / "data"
    runs = plan_runs(arguments.size, arguments.output, data, arguments.seeds, arguments.compare)
    if arguments.dry_run:
        for run in runs:
            read_config(run.arguments)  # refuses what is wrong
            print(shlex.join(["ponder", "train", *run.arguments]))
        return
    prepare_data(arguments.size, data)
    train(runs, arguments.jobs)
    folders = {seed: arguments.output / f"seed{seed}" for seed in arguments.seeds}
    parts = {folder: [run for run in runs if run.seed == seed] for seed, folder in folders.items()}
    analyse(parts, data, arguments.samples, arguments.jobs)
    if arguments.compare == "costs":
        table = write_costs(runs, folders, arguments.output)
    else:
        table = write_tables(folders, arguments.output)
    Console(highlight=False).print(table, soft_wrap=True)


if __name__ == "__main__":
    main()
