"""The Triton kernel in Triton's interpreter, on CPU tensors, against attention written out in fp64.

    TRITON_INTERPRET=1 python -m tests.kernels.interpreted_attention quick|grid|compiled

A process of its own, because Triton decides when it is imported whether it interprets.
"""

import sys
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_ponder.kernels import own_attention, triton_attention
from megatron_ponder.kernels.segments import Segments
from megatron_ponder.kernels.triton_attention import Blocks, Layout, weighted_attention

# Blocks so small that short rows have several, of unequal sides.
SMALL = Layout(Blocks(16, 32, 4, 1), Blocks(32, 16, 4, 1), Blocks(16, 32, 4, 1))
DEAD = -1e4


def written_out(
    q: Tensor, k: Tensor, v: Tensor, scale: float, log_w: Tensor | None, segments: Segments | None
) -> Tensor:
    """softmax(q·k · scale + log w + mask) v."""
    (batch, length, heads, _), places = q.shape, torch.arange(q.shape[0] * q.shape[1])
    starts = places // length * length if segments is None else segments.starts
    visible = (places >= starts[:, None]) & (places <= places[:, None])
    q, k, v = (x.flatten(0, 1).repeat_interleave(heads // x.shape[2], 1) for x in (q, k, v))
    logits = torch.einsum("tnd,snd->nts", q, k) * scale
    logits = logits if log_w is None else logits + log_w.flatten()
    p = logits.masked_fill(~visible, -torch.inf).softmax(-1)
    return torch.einsum("nts,snd->tnd", p, v).unflatten(0, (batch, length))


def segments_of(batch: int, length: int) -> Segments:
    """A long segment, short ones, one of a single slot, and ends that no block has."""
    total = batch * length
    bounds = sorted(bound for bound in {0, 3, 4, total // 2 + 1, total // 2 + 6, total} if bound <= total)
    return Segments.of(torch.tensor(bounds), total, total)


def compare(batch: int, length: int, heads: int, kv_heads: int, head_size: int, weighted: bool, segmented: bool):
    """Output and every gradient; w from 1 to 1e-30, and keys that are dead."""
    torch.manual_seed(0)
    inputs = [torch.randn(batch, length, n, head_size, requires_grad=True) for n in (heads, kv_heads, kv_heads)]
    log_w, segments = None, segments_of(batch, length) if segmented else None
    if weighted:
        log_w = -69 * torch.rand(batch, length)
        log_w[:, ::3], log_w[:, 5::7] = 0, DEAD
        log_w[:, 1:2], log_w[:, 2:3] = -20, -69
        inputs.append(log_w.requires_grad_())
    upstream = torch.randn(batch, length, heads, head_size)
    results = []
    for form, dtype in ((weighted_attention, torch.float32), (written_out, torch.float64)):
        given = [x.detach().to(dtype).requires_grad_() for x in inputs]
        y = form(*given[:3], head_size**-0.5, given[3] if weighted else None, segments)
        gradients = torch.autograd.grad((y * upstream).sum(), given)
        results.append([y.detach(), *gradients])
    for name, got, expected in zip(("y", "q", "k", "v", "log w"), *results, strict=False):
        assert got.isfinite().all(), name
        error = (got - expected).abs().max()
        assert error < 2e-5 * max(1, expected.abs().max()), (name, error)
    if weighted:
        of_w, exact = results[0][4], results[1][4]
        seen_alive = log_w.detach() > DEAD
        assert not of_w[~seen_alive].any() or segmented  # a segment may begin with a dead key
        faint = seen_alive & (log_w.detach() < -15) & (exact.abs() > 1e-37)
        if not segmented:  # as faint as the keys are, and as exact as fp32
            torch.testing.assert_close(of_w[faint].double(), exact[faint], rtol=1e-3, atol=0)


def dead_keys_are_not_there():
    """What they hold changes nothing, bit by bit."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 20, 1, 16) for _ in range(3))
    log_w = torch.zeros(1, 20)
    log_w[:, 4:7] = DEAD
    outputs = []
    for factor in (1, 30):
        k[:, 4:7] *= factor
        v[:, 4:7] *= factor
        outputs.append(weighted_attention(q, k, v, 0.25, log_w, None))
    assert torch.equal(*outputs)


def own_slots():
    """Slots that their own token alone sees, with this kernel for what first slots are asked."""
    torch.manual_seed(0)
    inputs = [torch.randn(2, 18, n, 16, requires_grad=True) for n in (2, 1, 1)]
    log_w = torch.randn(2, 6, 3).index_fill_(2, torch.tensor([0]), 0).flatten(1).requires_grad_()
    for segments in (None, segments_of(2, 6)):
        results = []
        for in_triton in (True, False):
            own_attention._in_triton = lambda _, chosen=in_triton: chosen
            y = own_attention.own_attention(*inputs, 0.25, log_w, segments, 3)
            results.append([y, *torch.autograd.grad(y.square().sum(), [*inputs, log_w])])
        for got, want in zip(*results, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def latent_slots():
    """Those of the second latent step alone, given the keys and values of first slots and of the first step."""
    torch.manual_seed(0)
    q = torch.randn(2, 6, 2, 16, requires_grad=True)
    keys, values = ([torch.randn(2, 6, 1, 16, requires_grad=True) for _ in range(3)] for _ in range(2))
    log_w = torch.randn(2, 6, 2, requires_grad=True)
    inputs = [q, *keys, *values, log_w]
    for segments in (None, segments_of(2, 6)):
        results = []
        for in_triton in (True, False):
            own_attention._in_triton = lambda _, chosen=in_triton: chosen
            y = own_attention.latent_attention(q, keys, values, 0.25, log_w, segments)
            results.append([y, *torch.autograd.grad(y.square().sum(), inputs)])
        for got, want in zip(*results, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def one_graph():
    """A compiler takes it in one piece, with its gradient, and gets the same."""
    torch.manual_seed(0)
    inputs = [torch.randn(1, 20, n, 16, requires_grad=True) for n in (2, 1, 1)]
    log_w = torch.randn(1, 20, requires_grad=True)

    def form(q: Tensor, k: Tensor, v: Tensor, log_w: Tensor) -> Tensor:
        return F.silu(weighted_attention(q, k, v, 0.25, log_w, None))

    results = []
    for chosen in (form, torch.compile(form, fullgraph=True, backend="aot_eager")):
        y = chosen(*inputs, log_w)
        results.append([y, *torch.autograd.grad(y.sum(), [*inputs, log_w])])
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager)


def main(what: str) -> None:
    """Compare, and raise where something differs."""
    triton_attention.layout = lambda head_size, dtype, capability: SMALL
    if what == "quick":
        compare(2, 19, 2, 1, 24, weighted=True, segmented=True)
        compare(1, 37, 1, 1, 16, weighted=True, segmented=False)
        dead_keys_are_not_there()
        own_slots()
        latent_slots()
    elif what == "compiled":
        one_graph()
    else:
        shapes = [(1, 33, 1, 1, 64), (2, 45, 4, 2, 72), (1, 64, 3, 1, 80), (1, 17, 2, 2, 96), (1, 1, 1, 1, 128)]
        shapes += [(1, 50, 1, 1, 128), (1, 100, 2, 1, 8)]
        for shape, weighted, segmented in product(shapes, (True, False), (True, False)):
            compare(*shape, weighted=weighted, segmented=segmented)


if __name__ == "__main__":
    main(sys.argv[1])
