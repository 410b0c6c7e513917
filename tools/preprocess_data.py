#!/usr/bin/env python3
"""Tokenise text files, folders of them or JSON Lines into Megatron's .bin/.idx format.

Writes PREFIX_KEY_document.bin, .idx and .json, where a .jsonl line or any other file is one document.

Example:
    python tools/preprocess_data.py --input corpus/*.jsonl --output-prefix data/corpus \\
        --tokenizer data/tokenizer.model --workers 8 --append-eod
"""

import argparse

from megatron_ponder.data.preprocessing import preprocess
from megatron_ponder.errors import command


@command
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", nargs="+", required=True, help="files, folders or glob patterns")
    parser.add_argument("--output-prefix", required=True, help="path of the dataset without _KEY_document.bin")
    parser.add_argument("--tokenizer", required=True, help="a .model or tokenizer.json file, or a folder with one")
    parser.add_argument("--workers", type=int, default=1, help="processes that tokenise (default: 1)")
    parser.add_argument("--append-eod", action="store_true", help="end each document with the end token")
    parser.add_argument("--key", default="text", help="field of a .jsonl line that holds the text (default: text)")
    arguments = parser.parse_args()
    report = preprocess(
        arguments.input,
        arguments.output_prefix,
        arguments.tokenizer,
        workers=arguments.workers,
        append_eod=arguments.append_eod,
        key=arguments.key,
    )
    print(report)


if __name__ == "__main__":
    main()
