"""One entry, one choice of kernel, and what estimates are told of it."""

import re

import pytest
import torch
from torch.nn.attention import varlen

from megatron_ponder.base.errors import UserError
from megatron_ponder.kernels import attention
from megatron_ponder.kernels.attention import DEAD, Call, Kernel, attend, choose
from megatron_ponder.kernels.segmented_attention import segmented_attention
from megatron_ponder.kernels.segments import Segments


def test_another_kernel_is_a_row(monkeypatch):
    def own(q, k, v, scale, log_w, segments):
        assert log_w is None or log_w.shape == q.shape[:2]  # not folded
        return torch.full_like(q, 7)

    def lacks(call):
        return None if call.dtype == torch.float64 and not (call.grouped or call.segmented) else "what it has not"

    row = Kernel("sdpa", own, lacks, "apart", block=4)
    monkeypatch.setattr(attention, "_KERNELS", (row, *attention._KERNELS))
    x, log_w, one = torch.randn(1, 4, 2, 8), torch.zeros(1, 4), Segments.of(torch.tensor([0, 4]), 4, 4)
    for weights in (None, log_w):
        assert (attend(x.double(), x.double(), x.double(), 0.3, weights) == 7).all()
        y = x.double()
        for other in (attend(x, x, x, 8**-0.5, weights), attend(y, y, y, 8**-0.5, weights, one)):
            assert other.shape == x.shape and not (other == 7).any()
    assert choose(Call("cuda", torch.float64)) is row
    assert choose(Call("cuda", torch.float64, grouped=True)) is not row


@pytest.mark.parametrize(("block", "pairs"), [(1, 36), (4, 48), (512, 64)])
def test_pairs_of_whole_blocks(block, pairs):
    """8 queries see 36 keys in all; those of two blocks of 4 read 16 + 32, and one block is the whole square."""
    assert Kernel("sdpa", lambda *_: None, lambda _: None, block=block).pairs(8) == pairs


# Forms, and which of them a call takes


def with_gradients(q, k, v, log_w, segments, kernel):
    """Output, and gradients of all that has some."""
    y = attend(q, k, v, q.shape[-1] ** -0.5, log_w, segments, kernel=kernel)
    inputs = [x for x in (q, k, v, log_w) if x is not None]
    return [y, *torch.autograd.grad((y * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum(), inputs)]


def random_inputs(dtype, batch=2, length=21):
    torch.manual_seed(0)
    shapes = [(batch, length, heads, 16) for heads in (4, 2, 2)]
    log_w = -10 * torch.rand(batch, length, dtype=dtype)
    log_w[:, ::3], log_w[:, 7] = 0, DEAD
    return [*(torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes), log_w.requires_grad_()]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("weighted", [True, False])
def test_w_on_the_side_of_values_is_the_same(dtype, tolerance, weighted):
    q, k, v, log_w = random_inputs(dtype)
    forms = (with_gradients(q, k, v, log_w if weighted else None, None, name) for name in ("sdpa", "value_side"))
    for folded, other in zip(*forms, strict=True):
        torch.testing.assert_close(other, folded, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("bounds", [None, [0, 5, 21, 30, 42]])
@pytest.mark.parametrize("weighted", [True, False])
def test_the_kernel_of_several_lengths_is_told_where_segments_begin(monkeypatch, bounds, weighted):
    """Its twin on a CPU takes what the kernel takes."""

    def twin(q, k, v, bounds_q, bounds_k, longest_q, longest_k, scale, window_size, enable_gqa):
        assert bounds_q is bounds_k and bounds_q.dtype == torch.int32 and enable_gqa
        assert longest_q == longest_k >= bounds_q.diff().max() and window_size == (-1, 0)
        assert q.shape[-1] == k.shape[-1] == v.shape[-1] == 16 + 8 * weighted
        return segmented_attention(q, k, v, scale, Segments.of(bounds_q, len(q), longest_q))

    monkeypatch.setattr(varlen, "varlen_attn", twin)
    (row,) = (kernel for kernel in attention._KERNELS if kernel.name == "varlen")
    everywhere = row._replace(name="auto", lacks=lambda call: None)
    monkeypatch.setattr(attention, "_KERNELS", (*attention._KERNELS[:1], everywhere))
    q, k, v, log_w = random_inputs(torch.float64)
    segments = None if bounds is None else Segments.of(torch.tensor(bounds), 42, 21)
    expected = with_gradients(q, k, v, log_w if weighted else None, segments, "sdpa")
    monkeypatch.setattr(attention, "_KERNELS", (everywhere,))
    got = with_gradients(q, k, v, log_w if weighted else None, segments, "auto")
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other)


BF16, FP32 = torch.bfloat16, torch.float32


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (Call("cpu", FP32), "sdpa"),
        (Call("cpu", BF16, segmented=True), "sdpa"),
        (Call("cuda", BF16), "sdpa"),
        (Call("cuda", BF16, segmented=True), "varlen"),
        (Call("cuda", FP32, segmented=True), "triton"),
    ],
)
def test_every_call_has_a_kernel(call, name):
    assert choose(call).name == name


@pytest.mark.parametrize(
    ("call", "name", "need"),
    [
        (Call("cpu", BF16), "triton", "a GPU"),
        (Call("cpu", BF16), "varlen", "a GPU"),
        (Call("cuda", FP32), "varlen", "training.precision bf16"),
        (Call("cuda", BF16, segmented=True), "sdpa", "data.reset_at_eod false on GPUs"),
        (Call("cpu", BF16, segmented=True), "value_side", "data.reset_at_eod false"),
    ],
)
def test_a_kernel_that_cannot_is_refused_in_one_line(call, name, need):
    refusal = f"training.attention_kernel {name} needs {need}; set training.attention_kernel to auto"
    with pytest.raises(UserError, match=f"^{re.escape(refusal)}$"):
        choose(call, name)


def test_what_no_kernel_computes_is_refused_with_what_each_would_need():
    heads = "triton needs heads of at most 128 channels, model.head_size"
    slots = " of latent slots that their own token alone sees (ponder.mode sps, ponder.latent_visibility own)"
    for call, said in (
        (Call("cuda", BF16, head_size=256, own=True), f"{slots}: {heads}; change one of these"),
        (Call("cuda", FP32, segmented=True, head_size=256), ": sdpa needs data.reset_at_eod false on GPUs, varlen "),
    ):
        with pytest.raises(UserError, match=f"^no kernel computes this attention{re.escape(said)}") as refusal:
            choose(call)
        assert heads in str(refusal.value)


@pytest.mark.parametrize(
    ("name", "device", "head_size", "operations"),
    [
        ("sdpa", "cpu", 64, 4 * 72),
        ("sdpa", "cuda", 64, 4 * 96),  # flash kernels have sizes of 64 and 96, and none between
        ("sdpa", "cuda", 128, 4 * 192),
        ("varlen", "cuda", 64, 4 * 96),
        ("triton", "cuda", 64, 4 * 64),
        ("triton", "cuda", 80, 4 * 128),
        ("value_side", "cuda", 64, 2 * (64 + 96)),
    ],
)
def test_operations_of_a_pair(name, device, head_size, operations):
    assert choose(Call(device, BF16), name).operations(head_size, weighted=True) == operations
