"""Train every way of spending compute on the same tokens, and draw loss against compute.

    python examples/pareto/pareto.py --size cpu --output runs/pareto --jobs 2

The same command goes on where it was stopped; what is finished is not done again.
"""

import argparse
from pathlib import Path

from runs import SIZES, plan_runs, prepare_data, train

from megatron_ponder.errors import command


@command
def main() -> None:
    """Make the data, train, measure, write tables and figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="cpu", help="configuration (default: cpu)")
    parser.add_argument("--output", type=Path, required=True, help="folder for everything that is made")
    parser.add_argument("--data", type=Path, help="folder of corpus and tokenizer; data/ in the output unless given")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="(default: 0 1 2)")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time (default: 1)")
    arguments = parser.parse_args()
    data = arguments.data or arguments.output / "data"
    runs = plan_runs(arguments.size, arguments.output, data, arguments.seeds)
    prepare_data(arguments.size, data)
    train(runs, arguments.jobs)


if __name__ == "__main__":
    main()
