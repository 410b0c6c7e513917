"""The norm against its formula, with gradients."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_ponder.kernels.rms_norm import rms_norm

OUT = 8


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def formula(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """The formula."""
    return x / ((x * x).mean(-1, keepdim=True) + epsilon).sqrt() * weight


def test_rms_norm_equals_its_formula_with_gradients():
    x, weight = random(3, 4, OUT).requires_grad_(), random(OUT, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, w: rms_norm(x, w, 1e-2), (x, weight))
    got, expected = rms_norm(x, weight, 1e-2), formula(x, weight, 1e-2)
    torch.testing.assert_close(got, expected, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(got, F.rms_norm(x, (OUT,), weight, 1e-2), rtol=1e-13, atol=1e-13)  # the GPU's path
    tangent = random(3, 4, OUT, seed=2)
    grads = torch.autograd.grad(got, (x, weight), tangent), torch.autograd.grad(expected, (x, weight), tangent)
    torch.testing.assert_close(*grads, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2**-7)])
def test_rms_norm_in_low_precision(dtype, tolerance, scale):
    hidden = 256
    inputs = [(scale * random(7, hidden)).to(dtype), random(hidden, seed=1, dtype=dtype)]
    tangent = random(7, hidden, seed=2, dtype=dtype)
    results = []
    for kind in (dtype, torch.float64):
        x, weight = (tensor.to(kind).requires_grad_() for tensor in inputs)
        norm = rms_norm if kind == dtype else formula
        y = norm(x, weight, 1e-5)
        assert y.dtype == kind
        results.append([y.detach(), *torch.autograd.grad(y, (x, weight), tangent.to(kind))])
    for got, expected in zip(*results, strict=True):
        assert got.dtype == dtype
        assert (got.double() - expected).abs().max() <= tolerance * expected.abs().max()
