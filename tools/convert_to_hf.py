"""`ponder convert-to-hf` as a file, for launchers that start files."""

from megatron_ponder.commands.convert_to_hf import main

if __name__ == "__main__":
    main()
