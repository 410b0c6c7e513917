"""Pruned passes that run only what they keep equal those that mask it."""

import pytest
import torch

from megatron_ponder.model.packed import packed_jacobi
from tests.models import random_tokens, small_model

TOKENS = random_tokens(3, 17)


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
@pytest.mark.parametrize("threshold", [1e-4, 0.1, 0.3, 0.6])
@pytest.mark.parametrize(("steps", "refinements"), [(1, 2), (2, 0), (3, 2)])
@pytest.mark.parametrize("documents", [False, True])
def test_packed_equals_masked(family, threshold, steps, refinements, documents):
    model = small_model(model__family=family, ponder__latent_steps=steps, inference__threshold=threshold)
    model.eod_id = 7 if documents else None
    tokens = TOKENS.masked_fill(TOKENS % 5 == 0, 7)
    rule = model.rule("hard", threshold)
    results = [model.jacobi(tokens, refinements, rule), packed_jacobi(model, tokens, refinements, rule)]
    found = []
    for result in results:
        weight = torch.linspace(-1, 1, result.output_BLH.numel(), dtype=torch.float64).view_as(result.output_BLH)
        loss = (result.output_BLH * weight).sum() + result.routing.log_w.exp().sum()
        found.append((loss, torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)))
    assert torch.equal(results[0].routing.executed, results[1].routing.executed)
    (loss, gradients), (packed, others) = found
    assert packed.item() == pytest.approx(loss.item(), rel=1e-12)
    for (name, _), gradient, other in zip(model.named_parameters(), gradients, others, strict=True):
        if gradient is not None:
            assert (gradient - other).norm() <= 1e-10 * gradient.norm(), name
