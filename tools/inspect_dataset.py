"""`ponder inspect-dataset` as a file, for launchers that start files."""

from megatron_ponder.commands.inspect_dataset import main

if __name__ == "__main__":
    main()
