"""Models from checkpoints: the same outputs, and refusals of what does not fit."""

import sysconfig
from pathlib import Path

import pytest
import torch

from megatron_ponder.base.errors import UserError
from megatron_ponder.checkpoint.load import load_model, load_weights
from megatron_ponder.checkpoint.reader import open_tensors, read_weights
from megatron_ponder.checkpoint.writer import write_weights_checkpoint
from megatron_ponder.config import Config
from megatron_ponder.data.tokenizer_training import train_tokenizer
from megatron_ponder.model.ponder import PonderLM
from megatron_ponder.model.transformer import ModelPart
from megatron_ponder.parallel.mesh import Axis, Mesh
from megatron_ponder.parallel.sharding import declarations
from tests.models import random_tokens, small_config, small_model

VOCABULARY = 400


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    """A real one, of 400 tokens."""
    sources = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[:5]
    return train_tokenizer(sources, tmp_path_factory.mktemp("tokenizer") / "bpe", VOCABULARY).path


def save(folder: Path, tokenizer: Path | None = None, **overrides) -> tuple[PonderLM, Config]:
    """A model in fp32, and its checkpoint."""
    overrides = {"model__vocab_size": VOCABULARY} | overrides
    model = small_model(**overrides).float()
    config = small_config(**overrides)
    weights = {name: parameter.detach() for name, parameter, _, _ in declarations(model)}
    write_weights_checkpoint(folder, weights, config, tokenizer)
    return model, config


@torch.no_grad()
@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"model__family": "gpt_neox", "ponder__router_hidden_size": 8},
        {"ponder__mode": "fixed", "model__tie_embeddings": True},
        {"ponder__mode": "vanilla", "model__num_kv_heads": 2},
    ],
)
def test_a_loaded_model_computes_the_same(tmp_path, tokenizer, overrides):
    model, config = save(tmp_path / "c", tokenizer, **overrides)
    loaded = load_model(tmp_path / "c")
    tokens = random_tokens(2, 8)
    expected = model.head(model.jacobi(tokens, 1, model.rule("hard")).output_BLH)
    got = loaded.model.head(loaded.model.jacobi(tokens, 1, loaded.model.rule("hard")).output_BLH)
    assert torch.equal(got, expected)
    assert not loaded.model.training
    assert (loaded.config, loaded.folder) == (config, tmp_path / "c")
    assert loaded.tokenizer.decode(loaded.tokenizer.encode("def f(x):")) == "def f(x):"
    assert loaded.model.eod_id is None


def test_type_tokenizer_and_documents(tmp_path, tokenizer):
    save(tmp_path / "a")
    loaded = load_model(tmp_path / "a", dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in loaded.model.parameters()} == {torch.bfloat16}
    assert loaded.tokenizer is None
    save(tmp_path / "b", tokenizer, data__reset_at_eod="true")
    loaded = load_model(tmp_path / "b")
    assert loaded.model.eod_id == loaded.tokenizer.eod_id


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(tmp_path, tokenizer):
    save(tmp_path / "c", tokenizer, model__vocab_size=VOCABULARY - 1)
    with pytest.raises(UserError, match=r"has 400 tokens, but the model 399; put back the tokenizer"):
        load_model(tmp_path / "c")


def test_a_padded_vocabulary_is_accepted(tmp_path, tokenizer):
    save(tmp_path / "c", tokenizer, model__vocab_size=VOCABULARY + 20)
    assert load_model(tmp_path / "c").model.head.weight.shape == (VOCABULARY + 20, 32)


def test_each_tensor_rank_takes_its_part(tmp_path):
    model, config = save(tmp_path / "c")
    ranks = [PonderLM(config.model, config.ponder, Mesh(tensor=Axis(2, rank))) for rank in range(2)]
    for rank in ranks:
        load_weights(rank, read_weights(tmp_path / "c"))
    for name, parameter, spec, _ in declarations(model):
        parts = [rank.get_parameter(name) for rank in ranks]
        if spec.shard_dim is None:
            assert all(torch.equal(part, parameter) for part in parts)
        else:
            assert torch.equal(torch.cat(parts, spec.shard_dim), parameter)


def test_each_pipeline_rank_reads_its_part_alone(tmp_path, monkeypatch):
    model, config = save(tmp_path / "c")
    parts = [ModelPart(range(1), last=False), ModelPart(range(1, 2), first=False)]
    taken = []
    for part in parts:
        rank = PonderLM(config.model, config.ponder, part=part)
        with open_tensors(tmp_path / "c") as tensors:
            asked = []
            get = tensors.get
            monkeypatch.setattr(
                tensors, "get", lambda kind, name, get=get, asked=asked: asked.append(name) or get(kind, name)
            )
            load_weights(rank, tensors.of_kind("weight"))
        own = {name: parameter for name, parameter, _, _ in declarations(rank)}
        assert sorted(asked) == sorted(own)
        assert all(torch.equal(parameter, model.get_parameter(name)) for name, parameter in own.items())
        taken += own
    assert sorted(taken) == sorted(name for name, *_ in declarations(model))


def test_a_pipeline_rank_refuses_a_checkpoint_that_lacks_its_parameters(tmp_path):
    _, config = save(tmp_path / "c")
    weights = read_weights(tmp_path / "c")
    last = PonderLM(config.model, config.ponder, part=ModelPart(range(1, 2), first=False))
    load_weights(last, {name: weight for name, weight in weights.items() if name != "embedding.weight"})
    with pytest.raises(UserError, match=r"differ in head.weight$"):
        load_weights(last, {name: weight for name, weight in weights.items() if name != "head.weight"})


def test_weights_of_another_model_are_refused(tmp_path):
    model, _ = save(tmp_path / "c")
    weights = read_weights(tmp_path / "c")
    other = small_config(ponder__mode="fixed", model__vocab_size=VOCABULARY)
    with pytest.raises(UserError, match=r"differ in router.output.bias and 1 more tensor$"):
        load_weights(PonderLM(other.model, other.ponder), weights)
    with pytest.raises(UserError, match=r"differ in head.weight$"):
        load_weights(model, {name: weight for name, weight in weights.items() if name != "head.weight"})
    with pytest.raises(UserError, match=r"head.weight has shape \(400, 31\), but the configuration says \(400, 32\)"):
        load_weights(model, weights | {"head.weight": weights["head.weight"][:, 1:]})
