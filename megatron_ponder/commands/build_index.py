"""Build the index cache of a training run ahead, so that its ranks find the order ready.

    ponder build-index --config FILE.yaml --data.cache_path FOLDER [--section.key value ...]

Takes the arguments of ponder train, and builds every epoch that training.steps read of each dataset. What is
there already is checked and kept; several of these, or training runs, may be at work at the same time.
"""

import sys
import time
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from megatron_ponder.base.errors import UserError, command
from megatron_ponder.base.launch import one_process
from megatron_ponder.config import TrainingPhase, read_config, training_phases
from megatron_ponder.config.batch_sizes import samples_of
from megatron_ponder.data.mixture import Mixture, build_ahead, open_mixture, validation_sets
from megatron_ponder.hf.starting_point import complete


@command
@one_process
def main(argv: Sequence[str]) -> None:
    """Read the configuration, build, print a table."""
    if not argv or set(argv) & {"-h", "--help"}:
        print(__doc__)
        return
    config = read_config(complete(argv))
    if not config.data.path:
        raise UserError("data.path is empty; give the prefix that ponder preprocess wrote (without .bin)")
    if config.data.cache_path is None:
        raise UserError("data.cache_path is not set; add --data.cache_path with the folder that the run will use")
    table = Table(title=f"order of the samples in {config.data.cache_path}, seed {config.training.seed}")
    for heading, justify in {"split": "left", "dataset": "left", "samples": "right", "epochs": "right"}.items():
        table.add_column(heading, justify=justify)
    table.add_column("seconds", justify="right")
    started = time.perf_counter()
    before = 0
    for phase in training_phases(config):
        mixture, samples = _needed(phase, before)
        before = samples["train"]
        for name, dataset, epochs in build_ahead(mixture, samples):
            elapsed, started = time.perf_counter() - started, time.perf_counter()
            row = (name, str(dataset.indexed.prefix), f"{dataset.samples_per_epoch:,}", f"{epochs:,}", f"{elapsed:.2f}")
            table.add_row(*row)
    table.caption = "samples are those of an epoch"
    Console(width=None if sys.stdout.isatty() else 110).print(table)


def _needed(phase: TrainingPhase, before: int) -> tuple[Mixture, dict[str, int]]:
    """The data of a phase, and how many samples are read of each split up to its end.

    Args:
        phase: of the run.
        before: samples that the phases before it consume.
    """
    data, training = phase.config.data, phase.config.training
    mixture = open_mixture(data, training.seed)
    samples = {"train": before + samples_of(training, phase.last_step - phase.first_step, before)}
    if training.eval_interval:
        samples |= dict.fromkeys(validation_sets(mixture.samples, data), training.eval_samples)
    return mixture, samples
