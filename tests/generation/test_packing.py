"""Packed linear layers compute what the plain ones do, in a twin that leaves the model alone."""

import pytest
import torch

from megatron_ponder.generation.packing import packed
from megatron_ponder.model.router import Rule
from tests.models import MIXED, random_tokens, small_model

WITH_ONEDNN = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this PyTorch has no oneDNN")


@WITH_ONEDNN
@pytest.mark.parametrize("features", [{}, {"model__family": "gpt_neox"}, MIXED])
def test_a_twin_computes_the_same(features):
    model = small_model(**features).float().eval()
    twin, rule, tokens = packed(model), Rule("hard", 0.3), random_tokens(2, 9)
    assert twin is not model and twin.head is not model.head
    with torch.no_grad():
        ours, theirs = (each.head(each.jacobi(tokens, 1, rule).output_BLH) for each in (model, twin))
    assert not torch.equal(ours, torch.zeros_like(ours))
    assert (ours - theirs).abs().max() <= 1e-4 * ours.abs().max()


@WITH_ONEDNN
def test_the_model_keeps_its_own_layers_and_the_twin_the_weights_of_its_making():
    model = small_model().float().eval()
    twin, x = packed(model), torch.randn(3, model.model_config.hidden_size)
    with torch.no_grad():
        before = twin.head(x)
        model.head.weight.zero_()
        assert torch.equal(model.head(x), torch.zeros_like(before))
        assert torch.equal(twin.head(x), before)
    assert [name for name, _ in twin.named_parameters()] == [name for name, _ in model.named_parameters()]


def test_what_onednn_does_not_have_stays_as_it_is():
    model = small_model()
    assert packed(model) is model  # fp64
