"""`ponder import-hf` as a file, for launchers that start files."""

from megatron_ponder.commands.import_hf import main

if __name__ == "__main__":
    main()
