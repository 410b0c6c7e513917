"""Sizes of a rank's part of a model, against models that are built, and worked out by hand."""

import itertools

import pytest

from megatron_ponder.estimates.communication import Formula
from megatron_ponder.estimates.memory import memory_estimate
from megatron_ponder.estimates.part import Product, part_sizes
from megatron_ponder.estimates.rank import Rank
from megatron_ponder.model.build import build_part
from megatron_ponder.model.ponder import PonderLM
from megatron_ponder.parallel.mesh import Axis, Mesh
from megatron_ponder.parallel.sharding import declarations
from tests.models import small_config

LAYOUTS = list(itertools.product([1, 2, 4], [1, 2, 3]))


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
@pytest.mark.parametrize("mode", ["vanilla", "fixed", "adaptive", "pause", "sps", "ponderlm"])
@pytest.mark.parametrize("router", [0, 24])
def test_parameters_of_every_rank(family, mode, router):
    for tensor, pipeline in LAYOUTS:
        config = small_config(
            model__family=family,
            model__num_layers=5,
            ponder__mode=mode,
            ponder__router_hidden_size=router,
            parallel__tensor=tensor,
            parallel__pipeline=pipeline,
            parallel__vocab_multiple=16,
        )
        for place in range(pipeline):
            model = build_part(config, Mesh(tensor=Axis(tensor), pipeline=Axis(pipeline, place)))
            built = [
                (one.dim(), one.numel(), spec.shard_dim is None, spec.of_heads, spec.matrix, spec.shape)
                for _, one, spec, _ in declarations(model)
            ]
            held = Rank(config, pipeline_rank=place).part
            assert list(held.parameters) == built
            assert held.count == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    "overrides", [{"model__num_kv_heads": 2}, {"model__tie_embeddings": "true"}, {"ponder__latent_steps": 4}]
)
def test_parameters_of_other_models(overrides):
    config = small_config(**overrides)
    model = PonderLM(config.model, config.ponder)
    assert Rank(config).part.count == sum(parameter.numel() for parameter in model.parameters())


def test_a_tied_embedding_counts_at_both_ends_of_a_pipeline():
    tied, own = (
        [
            Rank(small_config(model__num_layers=3, parallel__pipeline=3, model__tie_embeddings=tie), 1, place, "cpu")
            for place in range(3)
        ]
        for tie in ("true", "false")
    )
    for one, other in zip(tied, own, strict=True):
        assert one.part.count == other.part.count
        assert memory_estimate(one) == memory_estimate(other)
    reasons = [{term.reason for term in Formula(rank, 1).terms()} for rank in tied]
    assert ["gradient of the tied embedding" in said for said in reasons] == [True, False, True]


def test_a_gated_block_by_hand():
    # H 32, 4 heads of which 2 of keys, F 48, over 2 tensor ranks; 61 tokens padded to twice 32
    config = small_config(model__num_kv_heads=2)
    whole, half = (part_sizes(config.model, config.ponder, tensor, vocab_multiple=8) for tensor in (1, 2))
    block = half.block
    assert whole.block.parameters == 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48 + 2 * 32
    assert (block.query, block.key, block.query_heads, block.key_heads) == (16, 8, 2, 1)
    assert block.before == (Product(32, 16), Product(32, 8), Product(32, 8))
    assert block.after == (Product(16, 32), Product(32, 24), Product(32, 24), Product(24, 32))
    assert (block.expanded, block.activated, block.residual, block.sharded) == (48, 24, 4 * 32, 16 + 2 * 8 + 48)
    assert (half.columns, half.table) == (32, 32 * 32)
    assert half.router == (Product(32, 3),)


def test_a_block_without_a_gate_by_hand():
    block = part_sizes(small_config(model__family="gpt_neox").model, small_config().ponder).block
    assert block.after == (Product(32, 32), Product(32, 48), Product(48, 32))
    assert (block.expanded, block.activated, block.shares_input) == (48, 48, True)
    assert block.parameters == 4 * 32 * 32 + 2 * 32 * 48 + (4 * 32 + 48 + 32) + 2 * 2 * 32
