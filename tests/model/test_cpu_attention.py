"""Attention by blocks of queries equals PyTorch's own, for lengths around and far beyond a block."""

import pytest
import torch
import torch.nn.functional as F

from megatron_ponder.model.attention import attend
from megatron_ponder.model.cpu_attention import BLOCK, causal_attention


@pytest.mark.parametrize("length", [1, 2, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 7])
@pytest.mark.parametrize("size", [8, 24])
def test_equals_the_kernel_with_gradients(length, size):
    generator = torch.Generator().manual_seed(length)
    q, k, v, grad = torch.randn(4, 2, length, 3, size, generator=generator, dtype=torch.float64).unbind()
    results = []
    for compute in (causal_attention, kernel):
        inputs = [x.clone().requires_grad_() for x in (q, k, v)]
        y = compute(*inputs, 0.3)
        results.append((y.detach(), *torch.autograd.grad(y, inputs, grad)))
    for got, want in zip(*results, strict=True):
        assert got.shape == want.shape
        assert (got - want).abs().max() < 1e-12


def kernel(q, k, v, scale):
    heads_first = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(*heads_first, is_causal=True, scale=scale).transpose(1, 2)


def test_training_uses_blocks_and_low_precision_does_not():
    x = torch.randn(1, 4, 2, 8, requires_grad=True)
    assert "CausalAttention" in names_above(attend(x, x, x, 0.3, None, causal=True))
    low = torch.randn(1, 4, 2, 8, dtype=torch.bfloat16, requires_grad=True)
    assert "CausalAttention" not in names_above(attend(low, low, low, 0.3, None, causal=True))


def names_above(y) -> str:
    """The operations whose backward would run for y."""
    names, todo = [], [y.grad_fn]
    while todo:
        node = todo.pop()
        if node is not None:
            names.append(node.name())
            todo += [above for above, _ in node.next_functions]
    return " ".join(names)
