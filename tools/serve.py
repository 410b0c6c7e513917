"""`ponder serve` as a file, for launchers that start files."""

from megatron_ponder.commands.serve import main

if __name__ == "__main__":
    main()
