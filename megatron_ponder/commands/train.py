"""Pretrain a model, in one process or on any number of ranks.

    ponder train --config FILE.yaml [--section.key value ...]

The same command runs as one process, under torchrun, srun or mpirun. `--help` lists every key.
"""

from collections.abc import Sequence

from megatron_ponder.base.environment import without_local_rank
from megatron_ponder.base.errors import command
from megatron_ponder.base.signals import StopSignals


@command
def main(argv: Sequence[str]) -> None:
    """Read the configuration, join the other ranks, train."""
    with StopSignals() as signals:  # first of all, since imports take seconds, in which a job may be told to leave
        from megatron_ponder.config import check_layout, read_config, training_phases
        from megatron_ponder.hf.starting_point import complete

        config = read_config(complete(without_local_rank(argv)))
        # Imported when the configuration is right, so that a wrong one is answered at once.
        from megatron_ponder.base.launch import discover
        from megatron_ponder.parallel.process_group import process_group
        from megatron_ponder.training.trainer import train

        launch = discover()
        for phase in training_phases(config):
            check_layout(phase.config, launch)  # while no rank waits for another
        deterministic, patience = config.training.deterministic, config.parallel.start_timeout
        with process_group(launch, patience=patience, deterministic=deterministic) as device:
            train(config, device, signals)
