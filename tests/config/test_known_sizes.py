"""Sizes that are known by name are those of the examples."""

from pathlib import Path

import pytest

from megatron_ponder.base.errors import UserError
from megatron_ponder.base.yaml_files import read_mapping
from megatron_ponder.config import read_config
from megatron_ponder.config.known_sizes import SIZES, size_of
from megatron_ponder.estimates.new_run import parameters
from tests import REPOSITORY

EXAMPLES = [
    *sorted((REPOSITORY / "examples" / "configs").glob("*.yaml")),
    REPOSITORY / "examples/quickstart/adaptive.yaml",
]


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda file: file.stem)
def test_an_example_is_a_known_size(file: Path):
    content, name = read_mapping(file, "a configuration"), file.stem.partition("_")[::2]
    size = size_of("tiny" if file.stem == "adaptive" else "-".join([name[0], name[1].partition("_")[0]]))
    vocabulary = {"vocab_size": 2048} if file.stem == "adaptive" else {}  # that of the quickstart's tokenizer
    assert size.model == content["model"] | vocabulary
    assert size.learning_rate == content["optimizer"]["learning_rate"]
    assert size.global_batch_size == content["training"]["global_batch_size"]
    assert size.sequence_length == content["data"]["sequence_length"]


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("smollm2-135m", 134_515_008),
        ("smollm2-360m", 361_821_120),
        ("qwen3-0.6b", 596_049_920),
        ("llama-3.2-1b", 1_235_814_400),
        ("pythia-70m", 70_426_624),
        ("pythia-1.4b", 1_414_647_808),
    ],
)
def test_released_models_have_as_many_weights(name, published):
    settings = SIZES[name].model | {"biases": "all" if name.startswith("pythia") else "none"}
    config = read_config(["--ponder.mode=vanilla", *(f"--model.{key}={value}" for key, value in settings.items())])
    assert parameters(config) == published


def test_a_size_may_be_written_in_other_ways():
    assert size_of("Pythia_70M") is SIZES["pythia-70m"]
    with pytest.raises(UserError, match=r"no size is known as 1.4b; did you mean pythia-1.4b or llama-1.4b\?"):
        size_of("1.4b")
    with pytest.raises(UserError, match=r"no size is known as huge; there are tiny, pythia-70m"):
        size_of("huge")
