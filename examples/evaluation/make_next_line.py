"""Write a small multiple-choice task of the quickstart's corpus: which of four lines is the next one?

python examples/evaluation/make_next_line.py --corpus data/stdlib.jsonl --output data/stdlib_next_line.jsonl

Questions come from the documents that the quickstart holds out for validation. The wrong lines are from the same
document and as deep as the right one, so that looks alone do not tell. `stdlib_next_line.yaml` reads the file.
"""

import argparse
import itertools
import json
import random
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from megatron_ponder.base.errors import UserError, command
from megatron_ponder.base.files import make_folder, write_atomically
from megatron_ponder.data.splits import split_documents

CONTEXT_LINES = 5
CHOICES = 4
LEAST_CHARACTERS = 8  # of a line that is asked for


@command
def main(argv: Sequence[str]) -> None:
    """Draw questions evenly from the held-out documents."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, required=True, help="what make_corpus.py wrote")
    parser.add_argument("--output", type=Path, required=True, help="the .jsonl file to write")
    parser.add_argument("--split", default="95,5,0", help="data.split of the training run (default: 95,5,0)")
    parser.add_argument("--questions", type=int, default=200, help="(default: 200)")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    with arguments.corpus.open(encoding="utf-8") as lines:
        documents = [json.loads(line) for line in lines]
    held_out = split_documents(len(documents), arguments.split).get("valid", range(0))
    rng = random.Random(arguments.seed)
    drawn = [questions_of(documents[index], rng) for index in held_out]
    # One of each document in turn, so that long documents do not crowd out the others.
    in_turn = [question for turn in itertools.zip_longest(*drawn) for question in turn if question is not None]
    questions = in_turn[: arguments.questions]
    if not questions:
        raise UserError(f'"{arguments.split}" holds out no document of {arguments.corpus} to ask about; give another')
    make_folder(arguments.output.parent)
    write_atomically(arguments.output, "".join(json.dumps(question) + "\n" for question in questions))
    print(f"{len(questions)} questions about {len(held_out)} documents in {arguments.output}")


def questions_of(document: dict, rng: random.Random) -> list[dict]:
    """All questions about a document, in random order."""
    lines = [line.rstrip() for line in document["text"].splitlines()]
    by_depth = defaultdict(list)
    for line in dict.fromkeys(lines):
        if len(line.strip()) >= LEAST_CHARACTERS:
            by_depth[depth(line)].append(line)
    questions = []
    for number in range(CONTEXT_LINES, len(lines)):
        line, context = lines[number], lines[number - CONTEXT_LINES : number]
        others = [other for other in by_depth[depth(line)] if other != line and other not in context]
        if len(line.strip()) >= LEAST_CHARACTERS and context[-1] and line not in context and len(others) >= CHOICES - 1:
            choices = [line, *rng.sample(others, CHOICES - 1)]
            rng.shuffle(choices)
            answer = choices.index(line)
            questions.append(
                {"path": document["path"], "context": "\n".join(context), "choices": choices, "answer": answer}
            )
    rng.shuffle(questions)
    return questions


def depth(line: str) -> int:
    """Spaces before the text."""
    return len(line) - len(line.lstrip())


if __name__ == "__main__":
    main()
