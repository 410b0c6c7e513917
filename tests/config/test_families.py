"""Families become features when a configuration is read, also one that was written before there were features."""

import re
from pathlib import Path

import pytest
import yaml

from megatron_ponder.base.errors import UserError
from megatron_ponder.config import load_config, read_config, to_yaml
from megatron_ponder.config.families import FAMILIES
from tests import REPOSITORY

# The section as a run of that time wrote it, in full; llama's residual was sequential whatever it says.
WRITTEN_BEFORE = """\
model:
  family: {family}
  hidden_size: 96
  num_layers: 12
  num_heads: 4
  num_kv_heads: 4
  ffn_hidden_size: {ffn}
  vocab_size: 61
  max_position_embeddings: 2048
  norm_epsilon: 1.0e-05
  rope_theta: 10000.0
  rotary_fraction: {rotary}
  parallel_residual: {residual}
  tie_embeddings: false
  init_std: 0.02
"""
LLAMA, GPT_NEOX = {"family": "llama", "ffn": 256, "rotary": 1.0}, {"family": "gpt_neox", "ffn": 384, "rotary": 0.25}


def features(model) -> dict:
    return {name: getattr(model, name) for name in FAMILIES["llama"]}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_resolved_configuration_says_every_feature(family):
    config = read_config([f"--model.family={family}"])
    assert features(config.model) == FAMILIES[family]
    assert FAMILIES[family].items() <= yaml.safe_load(to_yaml(config))["model"].items()
    assert config.model.description == family


def test_a_given_feature_replaces_the_family_s():
    given = ["--model.norm=layer", "--model.biases=all", "--model.residual=parallel", "--model.gated_ffn=false"]
    model = read_config([*given, "--model.num_kv_heads=3", "--model.rotary_fraction=0.5"]).model
    own = {"norm": "layer", "biases": "all", "residual": "parallel", "gated_ffn": False, "rotary_fraction": 0.5}
    assert features(model) == FAMILIES["llama"] | own
    assert (model.ffn_hidden_size, model.num_kv_heads, model.rotated_channels) == (4 * 768, 3, 32)
    assert model.description.startswith("llama with norm layer, gated_ffn False, biases all")


@pytest.mark.parametrize(
    ("written", "residual"),
    [
        (LLAMA | {"residual": "true"}, "sequential"),
        (LLAMA | {"residual": "false"}, "sequential"),
        (GPT_NEOX | {"residual": "true"}, "parallel"),
        (GPT_NEOX | {"residual": "false"}, "sequential"),
    ],
)
def test_what_was_written_before_there_were_features(tmp_path, written, residual):
    path = tmp_path / "config.yaml"
    path.write_text(WRITTEN_BEFORE.format(**written))
    model = load_config(path).model
    assert features(model) == FAMILIES[written["family"]] | {"residual": residual}
    assert (model.family, model.ffn_hidden_size) == (written["family"], written["ffn"])
    path.write_text(to_yaml(load_config(path)))
    assert load_config(path).model == model


def test_the_former_key_on_a_command_line():
    former = lambda *given: read_config([f"--model.{one}" for one in given]).model.residual
    assert former("parallel_residual=true") == former("parallel_residual=false") == "sequential"
    assert former("parallel_residual=true", "family=gpt_neox") == "parallel"
    assert former("family=gpt_neox", "parallel_residual=False") == "sequential"
    assert former("parallel_residual=true", "residual=parallel") == "parallel"
    with pytest.raises(UserError, match=r"parallel_residual is often, .*; its name is model\.residual today"):
        former("parallel_residual=often")


def test_the_page_shows_every_family():
    page = Path(REPOSITORY, "docs", "configuration.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\w.*) \|$", page.split("### Families")[1].split("\n## ")[0], re.MULTILINE)
    header, *body = ([yaml.safe_load(cell.strip("`")) for cell in row.split(" | ")] for row in rows)
    assert {row[0]: dict(zip(header[1:], row[1:], strict=True)) for row in body} == FAMILIES
