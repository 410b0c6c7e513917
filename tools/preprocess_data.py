"""`ponder preprocess` as a file, for launchers that start files."""

from megatron_ponder.commands.preprocess import main

if __name__ == "__main__":
    main()
