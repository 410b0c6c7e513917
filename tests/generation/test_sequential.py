"""The central proof: sequential decoding equals the fixed point of the parallel passes."""

import pytest
import torch

from tests.generation.sequential import decode
from tests.models import LEARNED, random_tokens, small_model


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("threshold", [0.0, 1e-4, 0.3])
def test_adaptive_equals_exact(family, steps, threshold):
    scale = 20.0 if threshold == 1e-4 else 4.0  # sharp enough for weights below the threshold
    model = small_model(seed=steps, router_scale=scale, model__family=family, ponder__latent_steps=steps)
    tokens = random_tokens(1, 24, seed=steps)
    rule = model.rule("hard", threshold=threshold)
    want, executed = decode(model, rule, tokens[0])
    got = model.exact(tokens, rule)

    assert len(set(executed.tolist())) == 1 if threshold == 0 else len(set(executed.tolist())) > 1
    assert torch.equal(got.routing.executed[0], executed)
    assert (model.head(got.output_BLH[0]) - model.head(want)).abs().max() < 1e-9


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_fixed_equals_exact(family, steps):
    model = small_model(seed=steps, model__family=family, ponder__latent_steps=steps, ponder__mode="fixed")
    tokens = random_tokens(1, 24, seed=steps)
    want, executed = decode(model, model.rule("hard"), tokens[0])
    got = model.exact(tokens, model.rule("hard"))
    assert executed.tolist() == [steps] * 24
    assert (model.head(got.output_BLH[0]) - model.head(want)).abs().max() < 1e-9


@pytest.mark.parametrize("mode", ["fixed", "adaptive", "loop"])
@pytest.mark.parametrize("scale", [{"ponder__latent_scale": 0.3}, LEARNED])
def test_scaled_latents_in_both_evaluations(mode, scale):
    model = small_model(router_scale=4.0, ponder__mode=mode, **scale)
    tokens, rule = random_tokens(1, 20), model.rule("hard", threshold=0.2)
    want, executed = decode(model, rule, tokens[0])
    assert (model.exact(tokens, rule).output_BLH[0] - want).abs().max() < 1e-9
    assert executed.max() == 2


def test_vanilla_and_grouped_query_heads_equal_one_pass():
    model = small_model(ponder__mode="vanilla", model__num_kv_heads=2)
    tokens = random_tokens(1, 20)
    want, executed = decode(model, model.rule("hard"), tokens[0])
    got = model.jacobi(tokens, 0, model.rule("hard"))
    assert got.passes == 1 and executed.sum() == 0
    assert (got.output_BLH[0] - want).abs().max() < 1e-12


def test_router_bias_shifts_steps_in_both_evaluations():
    model = small_model(router_scale=3.0, ponder__latent_steps=3)
    tokens = random_tokens(1, 24)
    means = []
    for bias in (-2.0, 0.0, 2.0):
        rule = model.rule("hard", threshold=0.1, bias=bias)
        want, executed = decode(model, rule, tokens[0])
        got = model.exact(tokens, rule)
        assert torch.equal(got.routing.executed[0], executed)
        assert (got.output_BLH[0] - want).abs().max() < 1e-9
        means.append(executed.double().mean())
    assert means[0] < means[1] < means[2]


def test_documents_are_confined_in_both_evaluations():
    model = small_model(router_scale=3.0, eod_id=7)
    tokens = random_tokens(1, 20)
    tokens[0, [5, 6, 13]] = 7
    rule = model.rule("hard", threshold=0.2)
    want, _ = decode(model, rule, tokens[0])
    assert (model.exact(tokens, rule).output_BLH[0] - want).abs().max() < 1e-9
