"""Stated answers and depths, against an evaluator that knows nothing but the text."""

import json
import random
import re
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ponder.base.errors import UserError
from megatron_ponder.data.diagnostic import KINDS, MAX_DEPTH, NO_DEPTH, VOCABULARY, passages, question, write_corpus
from megatron_ponder.data.indexed_dataset import IndexedDataset
from megatron_ponder.data.preprocessing import preprocess
from megatron_ponder.data.tokenizer import load_tokenizer


def solve(text: str) -> tuple[list[str], int]:
    """The answer to a question such as `sum 3 1 4 =`, and its depth; `follow` is for `check_followed`."""
    kind, *asked = text.removesuffix(" =").split()
    if kind == "copy":
        return asked, 0
    if kind == "sum":
        total, additions = int(asked[0]), 0
        for term in asked[1:]:
            total, additions = (total + int(term)) % 5, additions + 1
        return [str(total)], additions
    if kind == "compose":
        # places instead of letters: entry i of the product of p and then q is p[q[i]]
        product, products = ["xyz".index(letter) for letter in asked[0]], 0
        for arrangement in asked[1:]:
            product, products = [product["xyz".index(letter)] for letter in arrangement], products + 1
        return ["".join("xyz"[place] for place in product)], products
    assert kind == "match"
    row, pairs = "".join(asked), 0
    while (shorter := re.sub(r"\(\)|\[\]|\{\}", "", row)) != row:  # only whole pairs after the last open one are there
        pairs += (len(row) - len(shorter)) // 2
        row = shorter
    assert set(row) <= set("([{")
    return [{"(": ")", "[": "]", "{": "}"}[row[-1]]], pairs


def check_followed(words: list[str], depths: list[int]) -> list[int]:
    """A `follow` with its answers; returns their depths."""
    equals = words.index("=")
    arrows = dict(word.split(">") for word in words[1:equals])
    assert len(arrows) == equals - 1 >= 6
    assert set(arrows) >= set(arrows.values())
    assert depths[: equals + 1] == [NO_DEPTH] * (equals + 1)
    found = []
    for at in range(equals + 1, len(words) - 1, 3):
        hops, start, answer = words[at : at + 3]
        reached = [start]
        for _ in range(int(hops.removesuffix(">"))):
            reached.append(arrows[reached[-1]])
        assert reached[-1] == answer
        assert depths[at : at + 3] == [NO_DEPTH, NO_DEPTH, len(reached) - 2]
        found.append(len(reached) - 2)
    assert depths[-1] == NO_DEPTH
    return found


def check(words: list[str], depths: list[int]) -> list[int]:
    """Every question of a passage; returns the depths of the answers."""
    found, at = [], 0
    assert len(words) == len(depths)
    while at < len(words):
        equals, end = words.index("=", at), words.index(";", at)
        if words[at] == "follow":
            found += check_followed(words[at : end + 1], depths[at : end + 1])
            at = end + 1
            continue
        answer, depth = solve(" ".join(words[at : equals + 1]))
        assert words[equals + 1 : end] == answer
        assert depths[at : end + 1] == [NO_DEPTH] * (equals + 1 - at) + [depth] * len(answer) + [NO_DEPTH]
        found += [depth] * len(answer)
        at = end + 1
    return found


@given(st.sampled_from(KINDS), st.integers(0, MAX_DEPTH), st.integers(0, 2**32))
def test_answers_and_depths(kind, depth, seed):
    made = question(kind, depth, random.Random(seed))
    found = check(made.words, made.depths)
    if kind == "follow":
        assert len(found) == 12
        assert max(found) <= depth
    else:
        assert set(found) == {0 if kind == "copy" else depth}
    if kind == "copy":
        assert len(set(made.words)) == depth + 4, "letters are distinct"
    assert set(made.words) <= set(VOCABULARY)


def test_examples():
    assert solve("sum 3 1 4 =") == (["3"], 2)
    assert solve("compose yxz zyx =") == (["zxy"], 1)
    assert solve("match ( [ { } =") == (["]"], 1)


@settings(max_examples=10)
@given(st.integers(1, 4), st.integers(1, 30), st.integers(0, 6), st.integers(0, 99))
def test_passages(documents, questions, max_depth, seed):
    made = list(passages(documents, questions, max_depth, seed))
    assert made == list(passages(documents, questions, max_depth, seed))
    assert len(made) == documents
    for passage in made:
        found = check(*passage)
        assert passage.words.count("=") == questions
        assert max(found) <= max_depth


def test_every_kind_and_depth_is_there():
    (made,) = passages(1, 2000, 3, 0)
    assert set(check(*made)) == {0, 1, 2, 3}
    for kind in KINDS:
        assert 320 < made.words.count(kind) < 480
    beyond = {word for word in VOCABULARY if ">" in word and set("gh") & set(word)}  # six are enough
    assert set(made.words) == set(VOCABULARY) - {"</s>", "<unk>", "5>", "6>", "7>", *beyond}


def test_questions_of_a_follow_are_drawn_independently():
    (made,) = passages(1, 1000, 2, 0, ["follow"])
    asked = [tuple(made.words[at - 2 : at]) for at, depth in enumerate(made.depths) if depth != NO_DEPTH]
    counts = Counter(asked)
    assert len(asked) == 12000
    assert len(counts) == 18
    assert all(560 < count < 780 for count in counts.values())
    in_turn = Counter(pairwise(asked))
    assert all(10 < count < 70 for count in in_turn.values())
    assert len(in_turn) == 18 * 18


def test_chosen_kinds_alone():
    (made,) = passages(1, 50, 3, 0, ["sum", "follow"])
    assert {word for word in made.words if word in KINDS} == {"sum", "follow"}
    check(*made)


def test_the_corpus_and_its_depths_are_aligned(tmp_path):
    made = write_corpus(tmp_path / "one", documents=20, questions=5, max_depth=4, seed=3)
    write_corpus(tmp_path / "two", documents=20, questions=5, max_depth=4, seed=3)
    write_corpus(tmp_path / "other", documents=20, questions=5, max_depth=4, seed=4)
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()
    assert made.text.read_bytes() != (tmp_path / "other" / made.text.name).read_bytes()

    tokenizer = load_tokenizer(made.tokenizer)
    assert tokenizer.vocab_size == len(VOCABULARY)
    prefix = preprocess([made.text], tmp_path / "corpus", made.tokenizer, append_eod=True).prefix
    text, depths = IndexedDataset(prefix), IndexedDataset(made.depths)
    assert len(text) == len(depths) == made.documents == 20
    assert text.num_tokens == depths.num_tokens == made.tokens
    assert np.array_equal(text.sequence_lengths, depths.sequence_lengths)
    answers = 0
    for index, line in enumerate(made.text.read_text().splitlines()):
        words = [tokenizer.piece(token) for token in text.read(index).tolist()]
        assert words == [*json.loads(line)["text"].split(), "</s>"]
        *stated, last = depths.read(index).tolist()
        assert last == NO_DEPTH
        answers += len(check(words[:-1], stated))
    assert answers == made.answers


@pytest.mark.parametrize("wrong", [{"documents": 0}, {"questions": 0}, {"max_depth": -1}, {"max_depth": 7}])
def test_no_corpus(tmp_path, wrong):
    with pytest.raises(UserError, match=r"are no corpus; give at least one document, .* a depth from 0 to 6"):
        write_corpus(tmp_path, **wrong)


@pytest.mark.parametrize(("kinds", "named"), [(["sum", "square"], "square"), ([], "none")])
def test_no_kind(tmp_path, kinds, named):
    with pytest.raises(UserError, match=f"{named} is no kind of question; choose from copy, sum"):
        write_corpus(tmp_path, kinds=kinds)
