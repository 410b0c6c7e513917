"""`ponder train` as a file, for launchers that start files."""

from megatron_ponder.base.ending import run_to_the_end
from megatron_ponder.commands.train import main

if __name__ == "__main__":
    run_to_the_end(main)
