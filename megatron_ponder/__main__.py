"""`python -m megatron_ponder COMMAND ...` is `ponder COMMAND ...`."""

from megatron_ponder.commands.ponder import start

if __name__ == "__main__":
    start()
