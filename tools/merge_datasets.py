#!/usr/bin/env python3
"""Join indexed datasets that were made with the same tokenizer into one, in the order given.

Example:
    python tools/merge_datasets.py --input data/a_text_document data/b_text_document --output-prefix data/both
"""

import argparse

from megatron_ponder.data.merging import merge_datasets
from megatron_ponder.errors import command


@command
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", nargs="+", required=True, help="datasets, as paths without .bin and .idx")
    parser.add_argument("--output-prefix", required=True, help="path of the new dataset without .bin and .idx")
    arguments = parser.parse_args()
    dataset = merge_datasets(arguments.input, arguments.output_prefix)
    print(f"{dataset.prefix}: {dataset.num_documents:,} documents, {dataset.num_tokens:,} tokens")


if __name__ == "__main__":
    main()
