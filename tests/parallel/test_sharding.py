"""Declarations: initial weights depend on seed and name alone, whatever the layout."""

import math

import pytest
import torch
from torch import nn

from megatron_ponder.model.norms import LayerNorm
from megatron_ponder.model.ponder import PonderLM
from megatron_ponder.parallel.layers import ColumnParallelLinear
from megatron_ponder.parallel.mesh import Axis, Mesh
from megatron_ponder.parallel.sharding import ParameterSpec, ShardedModule, constant, declarations, initialize, normal
from tests.models import small_config


def build(size: int = 1, rank: int = 0, seed: int = 5, **overrides) -> PonderLM:
    config = small_config(model__vocab_size=64, **overrides)
    model = PonderLM(config.model, config.ponder, Mesh(tensor=Axis(size, rank)))
    initialize(model, seed)
    return model


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
@pytest.mark.parametrize("tied", [False, True])
def test_initial_weights_do_not_depend_on_the_layout(family, tied):
    overrides = {"model__family": family, "model__tie_embeddings": tied, "ponder__router_hidden_size": 8}
    alone = {name: parameter for name, parameter, _, _ in declarations(build(**overrides))}
    ranks = [list(declarations(build(2, rank, **overrides))) for rank in range(2)]
    assert [[name for name, *_ in rank] for rank in ranks] == [list(alone)] * 2
    split = set()
    for (name, first, spec, _), (_, second, _, _) in zip(*ranks, strict=True):
        if spec.shard_dim is None:
            assert torch.equal(first, second)
            assert torch.equal(first, alone[name])
        else:
            split.add(name)
            assert torch.equal(torch.cat([first, second], spec.shard_dim), alone[name])
    assert {"embedding.weight", "transformer.blocks.0.attention.q_proj.weight"} <= split
    assert ("head.weight" in alone) == (not tied)


def test_initial_weights_follow_seed_and_name_alone():
    first, same, other = build(seed=5), build(seed=5), build(seed=6)
    deeper = dict(build(model__num_layers=2, model__num_heads=2, ponder__mode="fixed").named_parameters())
    for name, parameter in first.named_parameters():
        assert torch.equal(parameter, same.get_parameter(name))
        if name.endswith("q_proj.weight"):
            assert not torch.equal(parameter, other.get_parameter(name))
            assert torch.equal(parameter, deeper[name])
    blocks = first.transformer.blocks
    assert not torch.equal(blocks["0"].attention.q_proj.weight, blocks["1"].attention.q_proj.weight)
    assert not torch.equal(blocks["0"].attention.q_proj.weight, blocks["0"].attention.k_proj.weight)


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_scale_of_initial_weights(family):
    layers, hidden = 8, 64
    model = build(model__family=family, model__hidden_size=hidden, model__num_layers=layers)
    block = model.transformer.blocks["3"]

    def std(weight):
        return pytest.approx(weight.std().item(), rel=0.1)

    assert std(block.attention.q_proj.weight) == 0.02
    assert std(block.mlp.up_proj.weight) == 0.02
    assert std(block.attention.o_proj.weight) == 0.02 / math.sqrt(2 * layers)
    assert std(block.mlp.down_proj.weight) == 0.02 / math.sqrt(2 * layers)
    assert std(model.head.weight) == 0.02
    assert std(model.embedding.weight) == math.sqrt(2 / (5 * hidden))
    assert model.embed(torch.arange(64)).square().mean().sqrt().item() == pytest.approx(1, rel=0.05)
    assert (block.attention_norm.weight == 1).all()
    assert not model.router.output.weight.any()
    assert model.router.output.bias.tolist() == [0, 0, 2]


def test_vanilla_embeddings_begin_as_the_family_has_them():
    model = build(ponder__mode="vanilla", model__hidden_size=64)
    assert model.embedding.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert torch.equal(model.embed(torch.tensor([3])), model.embedding.weight[3:4])


def test_uneven_parts_are_an_internal_error():
    with pytest.raises(AssertionError, match="over 2 ranks"):
        ColumnParallelLinear(4, 5, Axis(2, 0), normal(1))


def test_undeclared_parameters_are_an_internal_error():
    with pytest.raises(AssertionError, match="stray holds parameters that it does not declare"):
        list(declarations(nn.ModuleDict({"norm": LayerNorm(4, 1e-5, Axis()), "stray": nn.Linear(2, 2)})))


def test_a_declaration_names_its_parameter_wherever_it_is():
    class Scale(ShardedModule):
        def __init__(self):
            super().__init__(Axis())
            self.declare("gain", ParameterSpec((3,), constant(2.0)))

    assert [name for name, *_ in declarations(Scale())] == ["gain"]
    nested = nn.ModuleList([Scale(), nn.Sequential(Scale())])
    assert [name for name, *_ in declarations(nested)] == ["0.gain", "1.0.gain"]
    initialize(nested, 0)
    assert nested[0].gain.tolist() == [2, 2, 2]
