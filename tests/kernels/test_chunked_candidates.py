"""The likeliest tokens of a head in chunks beside those of whole logits."""

import pytest
import torch

from megatron_ponder.kernels import cross_entropy
from megatron_ponder.model.ends import Head
from megatron_ponder.parallel.mesh import Axis
from tests.kernels.test_cross_entropy import TOKENS, Largest
from tests.models import small_config

COUNT, VOCAB = 3, 101  # which is padded to 104


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 1e-6)])
def test_a_head_never_makes_more_logits_than_a_chunk_has(dtype, tolerance, monkeypatch):
    config = small_config(model__vocab_size=VOCAB).model
    head = Head(config, Axis(), 4).to(dtype)
    torch.nn.init.normal_(head.weight)
    x = torch.randn(2, TOKENS, config.hidden_size, dtype=dtype, requires_grad=True)
    columns, largest, results = len(head.weight), [], []
    for tokens in (2 * TOKENS, 9):
        monkeypatch.setattr(cross_entropy, "CHUNK_BYTES", tokens * columns * dtype.itemsize)
        with Largest() as seen:
            values, ids = head(x, count=COUNT)
            loss = (values * torch.linspace(-1, 1, values.numel(), dtype=dtype).view_as(values)).sum()
            results.append([values, ids, *torch.autograd.grad(loss, [x, head.weight])])
        largest.append(seen.count)
    assert largest[0] == 2 * TOKENS * columns
    assert largest[1] == max(9 * columns, x.numel(), head.weight.numel()) < largest[0]
    for one, other in zip(*results, strict=True):
        assert one.shape == other.shape
        assert (one - other).double().norm() <= tolerance * one.double().norm()


def test_chunks_of_bf16_add_up_the_gradient_of_the_head_in_fp32(monkeypatch):
    head, errors = Head(small_config(model__vocab_size=VOCAB).model, Axis(), 4).bfloat16(), []
    torch.nn.init.normal_(head.weight)
    x = torch.randn(TOKENS * 8, head.weight.shape[1]).bfloat16()
    for tokens in (len(x), 1):
        monkeypatch.setattr(cross_entropy, "CHUNK_BYTES", tokens * len(head.weight) * 6)
        values, ids = head(x, count=COUNT)
        (found,) = torch.autograd.grad(values.sum(), head.weight)
        read = torch.zeros(len(x), len(head.weight), dtype=torch.float64).scatter_(1, ids, 1.0)
        expected = read.T @ x.double()
        errors.append(((found.double() - expected).norm() / expected.norm()).item())
    assert errors[1] < max(1.2 * errors[0], 2**-8)
