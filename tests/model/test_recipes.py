"""Recipes in place of tensors: the same gradients from less memory, and nothing that outlives its use."""

import gc
import weakref

import pytest
import torch
import torch.nn.functional as F

from megatron_ponder.model.recipes import KeptAsRecipe, keep_recipe
from tests.models import random_tokens, small_model


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_gradients_equal_and_less_is_kept(family, monkeypatch):
    model = small_model(model__family=family)
    tokens = random_tokens(2, 12)

    def gradients():
        model.zero_grad()
        model.jacobi(tokens, 2, model.rule("soft")).output_BLH.square().sum().backward()
        return {name: parameter.grad.clone() for name, parameter in model.transformer.named_parameters()}

    lean = gradients()
    never = lambda wanted, tensor, recipe: keep_recipe(False, tensor, recipe)
    monkeypatch.setattr("megatron_ponder.model.block.keep_recipe", never)
    for name, gradient in gradients().items():
        assert torch.equal(lean[name], gradient), name


def test_one_recipe_serves_all_readers():
    calls = []

    def recipe():
        calls.append(1)
        return x.detach().exp()

    x = torch.randn(5, 4, requires_grad=True)
    weights = [torch.randn(3, 4, requires_grad=True) for _ in range(3)]
    y = x.exp().detach().requires_grad_()
    with KeptAsRecipe(y, recipe):
        total = sum(F.linear(y.view(1, 5, 4), weight).sum() for weight in weights)
    total.backward()
    assert len(calls) == 1
    for weight in weights:
        assert torch.allclose(weight.grad, x.detach().exp().sum(0).expand(3, 4))


def test_a_context_that_is_gone_keeps_nothing_alive():
    gc.disable()
    try:
        x = torch.randn(1000, requires_grad=True)
        big = x * 2
        freed = weakref.ref(big)
        with KeptAsRecipe(torch.zeros(3), lambda big=big: big):
            pass
        del big
        assert freed() is None
    finally:
        gc.enable()


def test_without_gradients_there_is_no_context():
    with torch.no_grad(), keep_recipe(True, torch.zeros(1), lambda: None) as context:
        assert context is None
