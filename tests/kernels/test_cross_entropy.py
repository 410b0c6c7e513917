"""The loss of a head in chunks beside that of whole logits."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_ponder.kernels import cross_entropy
from megatron_ponder.kernels.cross_entropy import chunked_cross_entropy
from megatron_ponder.model.ends import Head
from megatron_ponder.parallel.mesh import Axis
from tests.models import small_config

TOKENS, HIDDEN, VOCAB, PADDED = 23, 8, 29, 32


class Largest(TorchDispatchMode):
    """Numbers of the largest tensor that any operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.count = max(self.count, result.numel())
        return result


def inputs(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, weight and labels, as large as logits of a few nats."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, TOKENS, HIDDEN, generator=generator, dtype=torch.float64)
    weight = torch.randn(PADDED, HIDDEN, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, VOCAB, (1, TOKENS), generator=generator)
    labels[0, :2] = torch.tensor([0, VOCAB - 1])
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), labels


def whole(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Losses by PyTorch alone."""
    return F.cross_entropy(F.linear(hidden, weight)[..., :VOCAB].transpose(1, 2), labels, reduction="none")


def error(found: Tensor, true: Tensor) -> float:
    return ((found.double() - true.double()).norm() / true.double().norm()).item()


@pytest.fixture(params=[1, 7, TOKENS - 1])
def rows(request, monkeypatch):
    """Tokens in a chunk."""
    monkeypatch.setattr(cross_entropy, "chunk_rows", lambda *_: request.param)
    return request.param


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 1e-6)])
def test_chunks_equal_the_whole_with_gradients(dtype, tolerance, rows):
    hidden, weight, labels = inputs(dtype)
    losses = whole(hidden, weight, labels)
    true = torch.autograd.grad(losses.sum() * 0.3, [hidden, weight])
    total, found = chunked_cross_entropy(hidden, weight, labels, Axis(), VOCAB)
    assert not found.requires_grad
    assert error(found, losses) < tolerance
    assert error(total, losses.sum()) < tolerance
    for _ in range(2):  # a pipeline may ask once for gradients of inputs, and later for those of weights
        gradients = torch.autograd.grad(total * 0.3, [hidden, weight], retain_graph=True)
        assert max(map(error, gradients, true)) < tolerance
    assert not gradients[1][VOCAB:].any()


def test_a_loss_that_is_no_number_has_gradients_that_are_none(rows):
    hidden, weight, labels = inputs(torch.float32)
    gradients = torch.autograd.grad(chunked_cross_entropy(hidden, weight, labels, Axis())[0] * torch.nan, hidden)
    assert gradients[0].isnan().all()


def test_gradients_of_a_bf16_head_are_added_up_in_fp32(rows):
    hidden, weight, labels = inputs(torch.bfloat16)
    wide = [tensor.detach().double().requires_grad_() for tensor in (hidden, weight)]
    true = torch.autograd.grad(whole(*wide, labels).sum() * 1e-3, wide)
    at_once = torch.autograd.grad(whole(hidden, weight, labels).sum() * 1e-3, [hidden, weight])
    total = chunked_cross_entropy(hidden, weight, labels, Axis(), VOCAB)[0]
    found = torch.autograd.grad(total * 1e-3, [hidden, weight])
    assert total.dtype == torch.float32
    assert all(a.dtype == torch.bfloat16 for a in found)
    for own, other, exact in zip(found, at_once, true, strict=True):
        assert error(own, exact) < max(1.2 * error(other, exact), 2**-8)


def test_a_head_never_makes_more_logits_than_a_chunk_has(monkeypatch):
    config = small_config(model__vocab_size=VOCAB).model
    head, labels = Head(config, Axis(), 4).double(), torch.arange(TOKENS) % VOCAB
    torch.nn.init.normal_(head.weight)
    x = torch.randn(TOKENS, config.hidden_size, dtype=torch.float64, requires_grad=True)
    largest, results = [], []
    for tokens in (TOKENS, 5):
        monkeypatch.setattr(cross_entropy, "CHUNK_BYTES", tokens * PADDED * 8)
        with Largest() as seen:
            total, losses = head(x, labels)
            results.append([total, losses, *torch.autograd.grad(total, [x, head.weight])])
        largest.append(seen.count)
    assert head(x[:0], labels[:0])[0] == 0
    assert largest[0] == max(TOKENS * PADDED, head.weight.numel())
    assert largest[1] == max(5 * PADDED, x.numel(), head.weight.numel())
    assert all(torch.allclose(a, b, rtol=1e-12, atol=1e-14) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize(("dtype", "size"), [(torch.float64, 8), (torch.float32, 4), (torch.bfloat16, 6)])
def test_chunks_fill_the_memory_that_is_set_aside(dtype, size):
    assert cross_entropy.chunk_rows(128_000, dtype) == 2**30 // (128_000 * size)
    assert cross_entropy.chunk_rows(2**40, dtype) == 1
