"""`ponder torchrun` as a file, for launchers that start files."""

from megatron_ponder.commands.torchrun import main

if __name__ == "__main__":
    main()
