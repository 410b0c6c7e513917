"""`ponder export-hf` as a file, for launchers that start files."""

from megatron_ponder.commands.export_hf import main

if __name__ == "__main__":
    main()
