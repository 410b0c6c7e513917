"""Text in which it is known how many dependent steps the answer to each question takes.

A document is a row of questions, each with its answer:

    copy d a f = d a f ;      the letters again
    sum 3 1 4 = 3 ;           the sum modulo 5
    compose yxz zyx = zxy ;   permutations applied to xyz, one after another
    match ( [ { } = ] ;       what closes the innermost bracket that is open
    follow b>c a>d c>a d>c = 2> a c 1> c a ;      where so many arrows lead from a letter, for several letters

The depth of an answer is the number of state updates between what the question shows and the answer: 0 for copies, one
less than there are terms for sums and permutations, the pairs that open and close after the bracket in question for
brackets, and one less than there are arrows to follow. Everything that is not an answer has no depth: questions are
drawn at random, so that no number of steps predicts them, and the rest is punctuation.
"""

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tokenizers

from megatron_ponder.base.errors import UserError
from megatron_ponder.base.files import make_folder, replacing, write_atomically
from megatron_ponder.data.dataset_writer import IndexedDatasetWriter

NO_DEPTH = -1
MODULUS = 5
DIGITS = [str(digit) for digit in range(MODULUS)]
LETTERS = list("abcdefgh")
START = "xyz"
ARRANGEMENTS = ["".join(arrangement) for arrangement in permutations(START)]
CLOSING = {"(": ")", "[": "]", "{": "}"}
ARROWS = [f"{start}>{end}" for start in LETTERS for end in LETTERS if start != end]
HOPS = [f"{hops}>" for hops in range(1, len(LETTERS))]
KINDS = ("copy", "sum", "compose", "match", "follow")
END_OF_DOCUMENT, UNKNOWN = "</s>", "<unk>"
SIGNS = (*DIGITS, *LETTERS, *ARRANGEMENTS, *CLOSING, *CLOSING.values(), *ARROWS, *HOPS)
VOCABULARY = [END_OF_DOCUMENT, UNKNOWN, ";", "=", *KINDS, *SIGNS]
OUTER_BRACKETS = 2
# Of a `follow`: answers, and the least number of letters. Many of those and few of these, because following is learnt
# several times as soon then.
FOLLOWED = 12
FEWEST_LETTERS = 6
MAX_DEPTH = len(LETTERS) - 2


class Passage(NamedTuple):
    """Words, one token each, and the depth of each of them."""

    words: list[str]
    depths: list[int]


@dataclass(frozen=True)
class DiagnosticCorpus:
    """What was written.

    Attributes:
        text: JSON Lines, one document a line.
        tokenizer: its `tokenizer.json`.
        depths: prefix of an indexed dataset that holds the depth of each token, the end token of documents included.
        documents, tokens, answers: how many; answers are tokens with a depth.
    """

    text: Path
    tokenizer: Path
    depths: Path
    documents: int
    tokens: int
    answers: int


def question(kind: str, depth: int, generator: random.Random) -> Passage:
    """One question with its answer.

    Args:
        kind: one of `KINDS`.
        depth: of the answer; for copies, whose depth is 0, one less than the number of letters; for `follow`, whose
            answers have depths of their own, the largest.
        generator: what is drawn from.
    """
    if kind == "follow":
        return _follow(depth, generator)
    if kind == "copy":
        asked = generator.sample(LETTERS, depth + 1)  # distinct, or what comes next would not be known
        answer, depth = asked, 0
    elif kind == "sum":
        asked = [generator.choice(DIGITS) for _ in range(depth + 1)]
        answer = [str(sum(map(int, asked)) % MODULUS)]
    elif kind == "compose":
        asked = [generator.choice(ARRANGEMENTS) for _ in range(depth + 1)]
        answer = [_composed(asked)]
    else:
        outer = [generator.choice(list(CLOSING)) for _ in range(generator.randint(0, OUTER_BRACKETS))]
        target = generator.choice(list(CLOSING))
        asked = [*outer, target, *_balanced(depth, generator)]
        answer = [CLOSING[target]]
    words = [kind, *asked, "=", *answer, ";"]
    before = [NO_DEPTH] * (len(asked) + 2)
    return Passage(words, [*before, *[depth] * len(answer), NO_DEPTH])


def _follow(max_depth: int, generator: random.Random) -> Passage:
    """One arrow from every letter to any other. Did they make a circle, three hops among six letters would take no more
    than two lookups in either direction: the letter that they do not meet is the answer."""
    letters = LETTERS[: max(FEWEST_LETTERS, max_depth + 2)]
    leads = {start: generator.choice([end for end in letters if end != start]) for start in letters}
    arrows = [f"{start}>{end}" for start, end in leads.items()]
    words = ["follow", *generator.sample(arrows, len(arrows)), "="]
    depths = [NO_DEPTH] * len(words)
    for _ in range(FOLLOWED):  # independently: what is asked next cannot be told from what was asked before
        depth, start = generator.randint(0, max_depth), generator.choice(letters)
        end = start
        for _ in range(depth + 1):
            end = leads[end]
        words += [HOPS[depth], start, end]
        depths += [NO_DEPTH, NO_DEPTH, depth]
    return Passage([*words, ";"], [*depths, NO_DEPTH])


def _composed(arrangements: list[str]) -> str:
    """Each arrangement says which place of the one before it every letter comes from: "yxz" swaps the first two."""
    state = START
    for arrangement in arrangements:
        state = "".join(state[START.index(letter)] for letter in arrangement)
    return state


def _balanced(pairs: int, generator: random.Random) -> list[str]:
    """Brackets that all close."""
    word, open_ = [], []
    while pairs or open_:
        if pairs and (not open_ or generator.random() < 0.5):
            open_.append(generator.choice(list(CLOSING)))
            word.append(open_[-1])
            pairs -= 1
        else:
            word.append(CLOSING[open_.pop()])
    return word


def passages(
    documents: int, questions: int, max_depth: int, seed: int, kinds: Sequence[str] = KINDS
) -> Iterator[Passage]:
    """Documents without their end tokens; kinds and depths are drawn uniformly.

    Args:
        documents: how many.
        questions: in each of them.
        max_depth: the largest depth.
        seed: another seed, other documents.
        kinds: of questions.
    """
    generator = random.Random(seed)
    for _ in range(documents):
        words, depths = [], []
        for _ in range(questions):
            kind = generator.choice(kinds)
            depth = max_depth if kind == "follow" else generator.randint(0, max_depth)  # it draws depths of its own
            drawn = question(kind, depth, generator)
            words += drawn.words
            depths += drawn.depths
        yield Passage(words, depths)


def write_tokenizer(folder: Path) -> Path:
    """Write a `tokenizer.json` in which every word is one token, and its configuration beside it."""
    words = tokenizers.models.WordLevel({word: index for index, word in enumerate(VOCABULARY)}, unk_token=UNKNOWN)
    tokenizer = tokenizers.Tokenizer(words)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([END_OF_DOCUMENT, UNKNOWN])
    path = folder / "tokenizer.json"
    write_atomically(path, tokenizer.to_str(pretty=True))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END_OF_DOCUMENT, "unk_token": UNKNOWN}
    write_atomically(path.with_name("tokenizer_config.json"), json.dumps(config, indent=2) + "\n")
    return path


def write_corpus(
    folder: Path,
    documents: int = 5000,
    questions: int = 24,
    max_depth: int = 5,
    seed: int = 0,
    kinds: Sequence[str] = KINDS,
) -> DiagnosticCorpus:
    """Write text, tokenizer and depths.

    Args:
        folder: made if needed.
        documents, questions, max_depth, seed, kinds: see `passages`.

    Raises:
        UserError: if there would be no document or no question, or a depth or kind that there is not.
    """
    if documents < 1 or questions < 1 or not 0 <= max_depth <= MAX_DEPTH:
        raise UserError(
            f"{documents} documents of {questions} questions with depths up to {max_depth} are no corpus; give at "
            f"least one document, one question and a depth from 0 to {MAX_DEPTH}"
        )
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown or not kinds:
        raise UserError(f"{', '.join(unknown) or 'none'} is no kind of question; choose from {', '.join(KINDS)}")
    make_folder(folder)
    text, depths = folder / "diagnostic.jsonl", folder / "depths"
    answers = 0
    with (
        replacing(text) as aside,
        aside.open("w", encoding="utf-8") as out,
        IndexedDatasetWriter(depths, np.dtype("<i2")) as sidecar,
    ):
        for passage in passages(documents, questions, max_depth, seed, kinds):
            out.write(json.dumps({"text": " ".join(passage.words)}) + "\n")
            sidecar.add_document([*passage.depths, NO_DEPTH])  # the end token is the last
            answers += sum(depth != NO_DEPTH for depth in passage.depths)
        tokens = sidecar.num_tokens
    return DiagnosticCorpus(text, write_tokenizer(folder), depths, documents, tokens, answers)
