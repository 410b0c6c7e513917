"""`ponder train-tokenizer` as a file, for launchers that start files."""

from megatron_ponder.commands.train_tokenizer import main

if __name__ == "__main__":
    main()
