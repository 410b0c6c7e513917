"""`ponder build-index` as a file, for launchers that start files."""

from megatron_ponder.commands.build_index import main

if __name__ == "__main__":
    main()
