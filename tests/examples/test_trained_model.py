"""The trained model that comes with the repository: it takes as many steps as the answer is deep."""

from pathlib import Path

import pytest
import torch

from megatron_ponder.checkpoint.load import LoadedModel, load_model
from megatron_ponder.data.diagnostic import NO_DEPTH, passages
from megatron_ponder.evaluation.perplexity import Setting
from megatron_ponder.evaluation.pondering import TokenMeasurements, measure
from megatron_ponder.generation.generate import generate
from megatron_ponder.model.router import Rule
from tests import REPOSITORY

FOLDER = REPOSITORY / "examples" / "diagnostic" / "model"
MAX_DEPTH, LARGEST = 2, 300_000
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
        assert (measured.loss[there] < 0.5).mean() > 0.98  # the answer is by far the likeliest


def test_generation_takes_the_steps_and_finds_the_answers(loaded):
    begin = "follow b>c a>d c>b d>f e>a f>e ="  # a d f e
    for asked, steps, answer in (("1> a", 0, "d"), ("2> a", 1, "f"), ("3> a", 2, "e")):
        (generation,) = generate(loaded.model, [f"{begin} {asked}"], 1, tokenizer=loaded.tokenizer)
        assert loaded.tokenizer.decode(generation.tokens).strip() == answer
        assert generation.executed_steps[-1] == steps


def size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def test_it_is_small_as_a_checkpoint_and_as_an_export(ponder, tmp_path):
    ponder("export-hf", "--checkpoint", FOLDER, "--output", tmp_path / "export")
    assert size(FOLDER) < LARGEST
    assert size(tmp_path / "export") < LARGEST
