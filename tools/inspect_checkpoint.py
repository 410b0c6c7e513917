"""`ponder inspect-checkpoint` as a file, for launchers that start files."""

from megatron_ponder.commands.inspect_checkpoint import main

if __name__ == "__main__":
    main()
