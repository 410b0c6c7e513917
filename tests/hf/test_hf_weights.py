import pytest
import torch

from megatron_ponder.base.errors import UserError
from megatron_ponder.hf import weights as names
from tests.hf.exported import weights_of
from tests.hf.plain_names import to_gpt_neox, to_llama
from tests.models import small_model


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(tensor, second[name]) for name, tensor in first.items())


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
@pytest.mark.parametrize("option", [{}, {"ponder__router_hidden_size": 8}, {"model__tie_embeddings": True}])
def test_export_names_both_ways(family, option):
    ours = weights_of(small_model(model__family=family, **option))
    theirs = names.to_export(ours)
    assert same(names.from_export(theirs), ours)
    assert "model.layers.1.self_attn.q_proj.weight" in theirs
    assert not set(theirs) & (set(ours) - {name for name in ours if name.startswith("router.")})


def test_llama_names_both_ways():
    ours = weights_of(small_model(ponder__mode="vanilla", model__num_kv_heads=2))
    assert same(names.from_llama(to_llama(ours)), ours)


def test_gpt_neox_names_both_ways():
    ours = weights_of(small_model(ponder__mode="vanilla", model__family="gpt_neox"))
    theirs = to_gpt_neox(ours, num_heads=4)
    assert same(names.from_gpt_neox(theirs, num_heads=4), ours)
    theirs["lm_head.weight"] = theirs.pop("embed_out.weight")
    assert same(names.from_gpt_neox(theirs, num_heads=4), ours)
    joined = theirs["gpt_neox.layers.1.attention.query_key_value.weight"].view(4, 3, 8, 32)
    assert torch.equal(joined[2, 1], ours["transformer.blocks.1.attention.k_proj.weight"].view(4, 8, 32)[2])


def test_tables_of_older_versions_are_left_out():
    old = {
        "gpt_neox.layers.0.attention.bias": torch.ones(1),
        "gpt_neox.layers.0.attention.masked_bias": torch.ones(1),
        "gpt_neox.layers.0.attention.rotary_emb.inv_freq": torch.ones(1),
        "gpt_neox.layers.0.attention.dense.bias": torch.ones(1),
    }
    assert list(names.from_gpt_neox(old, num_heads=4)) == ["transformer.blocks.0.attention.o_proj.bias"]


def test_unknown_weights_are_refused():
    with pytest.raises(UserError, match=r"the weight model\.layers\.0\.self_attn\.sinks has no place"):
        names.from_llama({"model.layers.0.self_attn.sinks": torch.ones(1)})
    with pytest.raises(UserError, match=r"other\.bias has no place"):
        names.to_export({"other.bias": torch.ones(4)})
