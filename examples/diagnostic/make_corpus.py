"""Write text in which the depth of every answer is known, the tokenizer for it, and the depths.

python examples/diagnostic/make_corpus.py --output data/diagnostic --seed 0
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from megatron_ponder.base.errors import command
from megatron_ponder.data.diagnostic import KINDS, VOCABULARY, write_corpus


@command
def main(argv: Sequence[str]) -> None:
    """Parse the command line and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for everything that is made")
    parser.add_argument("--seed", type=int, default=0, help="another seed, other questions (default: 0)")
    parser.add_argument("--documents", type=int, default=5000, help="(default: 5000)")
    parser.add_argument("--questions", type=int, default=24, help="in each document (default: 24)")
    parser.add_argument("--max-depth", type=int, default=5, help="the largest depth, up to 6 (default: 5)")
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), help="of questions (default: all)")
    arguments = parser.parse_args(argv)
    made = write_corpus(
        arguments.output,
        arguments.documents,
        arguments.questions,
        arguments.max_depth,
        arguments.seed,
        arguments.kinds,
    )
    print(f"{made.text}: {made.documents:,} documents, {made.tokens:,} tokens, {made.answers:,} of them answers")
    print(f"{made.tokenizer}: {len(VOCABULARY)} tokens")
    print(f"{made.depths}.bin and .idx: the depth of every token")


if __name__ == "__main__":
    main()
