"""A gate against its formula."""

import pytest
import torch
import torch.nn.functional as F

from megatron_ponder.kernels.gated import gated


@pytest.mark.parametrize(("activation", "formula"), [("silu", F.silu), ("gelu", F.gelu)])
def test_a_gate_equals_its_formula_with_gradients(activation, formula):
    gate, up = torch.randn(2, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    assert torch.equal(gated(activation, gate, up), formula(gate) * up)
    leaves = (activation, gate.detach().requires_grad_(), up.detach().requires_grad_())
    assert torch.autograd.gradcheck(gated, leaves)
