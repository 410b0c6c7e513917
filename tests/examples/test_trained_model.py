"""The trained model that comes with the repository: it takes as many steps as the answer is deep."""

import re
import shlex
from pathlib import Path

import pytest
import torch

from docs.refresh import exchanges
from megatron_ponder.checkpoint.load import LoadedModel, load_model
from megatron_ponder.config import read_config
from megatron_ponder.data.diagnostic import NO_DEPTH, passages
from megatron_ponder.evaluation.perplexity import Setting
from megatron_ponder.evaluation.pondering import TokenMeasurements, measure
from megatron_ponder.generation.generate import generate
from megatron_ponder.model.router import Rule
from tests import REPOSITORY

FOLDER = REPOSITORY / "examples" / "diagnostic" / "model"
MAX_DEPTH = 2
SMALLEST, LARGEST = 100_000, 300_000
UNSEEN = 1  # the seed of documents that it was not trained on


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return load_model(FOLDER)


@pytest.fixture(scope="module")
def documents() -> list:
    return list(passages(24, 1, MAX_DEPTH, UNSEEN, ["follow"]))


@pytest.fixture(scope="module")
def measured(loaded, documents) -> TokenMeasurements:
    batch = torch.tensor([loaded.tokenizer.encode(" ".join(passage.words)) for passage in documents])
    inference = loaded.config.inference
    return measure(loaded.model, [batch], Setting(Rule("hard", inference.threshold, inference.router_bias), None))


@pytest.mark.parametrize("depth", [*range(MAX_DEPTH + 1), NO_DEPTH])
def test_steps_go_where_the_depth_is(measured, documents, depth):
    """A position counts under the depth of the token that it predicts."""
    there = torch.tensor([passage.depths[1:] for passage in documents]).flatten().numpy() == depth
    assert there.sum() > 50
    asked = max(depth, 0)
    assert (measured.executed[there] == asked).mean() > 0.9
    if depth != NO_DEPTH:
        assert (measured.loss[there] < 0.5).mean() > 0.95  # the answer is by far the likeliest


def test_generation_takes_the_steps_and_finds_the_answers(loaded):
    begin = "follow b>c a>d c>b d>f e>a f>e ="  # a d f e
    for asked, steps, answer in (("1> a", 0, "d"), ("2> a", 1, "f"), ("3> a", 2, "e")):
        (generation,) = generate(loaded.model, [f"{begin} {asked}"], 1, tokenizer=loaded.tokenizer)
        assert loaded.tokenizer.decode(generation.tokens).strip() == answer
        assert generation.executed_steps[-1] == steps


def size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def test_it_is_small_as_a_checkpoint_and_as_an_export(ponder, tmp_path):
    assert ponder("export-hf", "--checkpoint", FOLDER, "--output", tmp_path / "export").code == 0
    for folder in (FOLDER, tmp_path / "export"):
        assert SMALLEST < size(folder) < LARGEST


def test_it_was_trained_as_its_file_says():
    stated = read_config(["--config", str(FOLDER.with_name("late.yaml"))])
    kept = read_config(["--config", str(FOLDER / "config.yaml")])
    for section in ("ponder_training", "optimizer", "inference", "data"):
        assert getattr(kept, section) == getattr(stated, section)


def test_the_first_command_of_the_readme_and_of_make_is_the_same():
    readme, makefile = ((REPOSITORY / name).read_text(encoding="utf-8") for name in ("README.md", "Makefile"))
    (first, *_), (made,) = exchanges(readme), re.findall(r"(?ms)^demo: .*?\n\t\$\(BIN\)/(.*?)\n\n", makefile)
    assert shlex.split(first[0].replace("\\\n", "")) == shlex.split(made.replace("\\\n", ""))
