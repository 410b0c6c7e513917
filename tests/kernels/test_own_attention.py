"""Slots that their own token alone sees: against a mask written out, in fp64, with every gradient."""

import pytest
import torch
from torch import Tensor

from megatron_ponder.base.errors import UserError
from megatron_ponder.kernels.attention import DEAD, Call, OwnSlots, _masked, attend, attend_latent, choose
from megatron_ponder.kernels.own_attention import latent_attention, own_attention
from megatron_ponder.kernels.segments import Segments
from tests.grids import in_pairs

BATCH, TOKENS, HEADS, CHANNELS = 2, 13, 4, 8
SCALE = CHANNELS**-0.5


def written_out(
    q: Tensor, k: Tensor, v: Tensor, scale: float, log_w: Tensor | None, segments: Segments | None, slots: int
) -> Tensor:
    """softmax(q·k · scale + log w + mask) v: first slots up to the query's token, and its own further ones."""
    k, v = (x.repeat_interleave(q.shape[2] // k.shape[2], 2) for x in (k, v))
    places = torch.arange(q.shape[1])
    token, step = places // slots, places % slots
    first, own = step == 0, token == token[:, None]
    seen = ((first & (token <= token[:, None])) | (own & (step <= step[:, None]))).expand(len(q), -1, -1)
    if segments is not None:
        of_slots = segments.starts.view(len(q), -1).repeat_interleave(slots, 1)
        seen = seen & (of_slots[:, :, None] == of_slots[:, None])
    logits = torch.einsum("bqnd,bknd->bnqk", q, k) * scale
    logits = logits if log_w is None else logits + log_w[:, None, None]
    return torch.einsum("bnqk,bknd->bqnd", logits.masked_fill(~seen[:, None], -torch.inf).softmax(-1), v)


def inputs_of(slots: int, key_heads: int, weighted: bool, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """q, k, v and log w, 0 of first slots and small of some others."""
    torch.manual_seed(slots)
    length = TOKENS * slots
    given = [torch.randn(BATCH, length, n, CHANNELS).to(dtype) for n in (HEADS, key_heads, key_heads)]
    if weighted:
        log_w = -3 * torch.rand(BATCH, TOKENS, slots).double()
        log_w[:, :, 0], log_w[:, 4, 1:] = 0, DEAD
        given.append(log_w.flatten(1))
    return [x.requires_grad_() for x in given]


def segments_of(segmented: bool) -> Segments | None:
    return Segments.of(torch.tensor([0, 5, 13, 14, 26]), BATCH * TOKENS, TOKENS) if segmented else None


@pytest.mark.parametrize(
    ("slots", "key_heads", "weighted", "segmented"), in_pairs([2, 4], [2, 4], [False, True], [False, True])
)
def test_it_is_attention_with_a_mask(slots, key_heads, weighted, segmented):
    given, segments = inputs_of(slots, key_heads, weighted), segments_of(segmented)
    log_w = given[3] if weighted else None
    upstream = torch.randn_like(given[0])
    results = []
    for form in (written_out, own_attention, *([] if weighted else [_masked])):
        y = form(*given[:3], SCALE, log_w, segments, slots)
        results.append([y, *torch.autograd.grad((y * upstream).sum(), given)])
    for result in results[1:]:
        for got, want in zip(result[:4], results[0][:4], strict=True):
            assert (got - want).abs().max() < 1e-12
    if weighted:  # those of first slots are no numbers that anybody learns
        further = torch.arange(TOKENS * slots) % slots > 0
        assert all((result[4] - results[0][4])[:, further].abs().max() < 1e-12 for result in results[1:])
        assert not results[1][4][:, ~further].any()


def test_bf16_is_added_up_in_fp32():
    given = inputs_of(3, 2, weighted=False, dtype=torch.bfloat16)
    want = written_out(*(x.double() for x in given), SCALE, None, None, 3)
    assert (own_attention(*given, SCALE, None, None, 3).double() - want).abs().max() < 0.02


def test_slots_that_are_not_there_are_not_seen():
    """Packed: the slots of tokens that run fewer are left out, of the others nothing changes."""
    q, k, v, log_w = (x.detach()[:1] for x in inputs_of(3, 2, weighted=True))
    ran = torch.arange(TOKENS) % 3
    places = (torch.arange(3) <= ran[:, None]).flatten().nonzero().squeeze(1)
    segments = Segments.of(torch.tensor([0, 6, TOKENS]), TOKENS, TOKENS)
    packed = [x[:, places].requires_grad_() for x in (q, k, v)]
    got = attend(*packed, SCALE, log_w[:, places], segments, own=OwnSlots(3, places, 1, TOKENS))
    dead = log_w.masked_fill(~torch.isin(torch.arange(3 * TOKENS), places), DEAD)
    whole = [x.clone().requires_grad_() for x in (q, k, v)]
    want = written_out(*whole, SCALE, dead, segments, 3)[:, places]
    assert (got - want).abs().max() < 1e-13
    upstream = torch.randn_like(got)
    for mine, other in zip(
        torch.autograd.grad((got * upstream).sum(), packed),
        torch.autograd.grad((want * upstream).sum(), whole),
        strict=True,
    ):
        assert (mine - other[:, places]).abs().max() < 1e-13


def check_compiled(form, inputs):
    """In one graph a function of leaves has the same values and gradients."""
    results = []
    for chosen in (form, torch.compile(form, fullgraph=True, backend="aot_eager")):
        y = chosen(*inputs)
        results.append([y, *torch.autograd.grad(y.sum(), inputs)])
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager)


def test_a_compiler_sees_one_operation():
    given = inputs_of(2, 2, weighted=True, dtype=torch.float32)

    def form(q, k, v, log_w):
        return own_attention(q, k, v, SCALE, log_w, None, 2).sin()

    check_compiled(form, given)


def test_kernels_that_there_are_for_it():
    assert choose(Call("cpu", torch.float64, own=True)).name == "sdpa"
    assert choose(Call("cuda", torch.bfloat16, own=True)).name == "triton"
    with pytest.raises(UserError, match="attention_kernel varlen has every slot see all before it"):
        choose(Call("cuda", torch.bfloat16, own=True), "varlen")
    with pytest.raises(UserError, match="attention_kernel sdpa needs a CPU"):
        choose(Call("cuda", torch.bfloat16, own=True), "sdpa")


# One latent step at a time -----------------------------------------------------------------------------------------


def steps_of(x: Tensor, slots: int) -> list[Tensor]:
    """(B, L · S, ..) → (B, L, ..) of every step."""
    return list(x.unflatten(1, (-1, slots)).unbind(2))


@pytest.mark.parametrize(
    ("slots", "key_heads", "weighted", "segmented"), in_pairs([2, 4], [2, 4], [False, True], [False, True])
)
def test_each_step_is_that_of_all_slots(slots, key_heads, weighted, segmented):
    given, segments = inputs_of(slots, key_heads, weighted), segments_of(segmented)
    log_w = given[3] if weighted else None
    want = written_out(*given[:3], SCALE, log_w, segments, slots)
    q, k, v = (steps_of(x, slots) for x in given[:3])
    log_w_BLK = log_w.unflatten(1, (-1, slots))[..., 1:] if weighted else None
    for step in range(1, slots):
        seen = slice(0, step + 1)
        weights = log_w_BLK[..., :step] if weighted else None
        got = attend_latent(q[step], k[seen], v[seen], SCALE, weights, segments)
        of_step = steps_of(want, slots)[step]
        assert (got - of_step).abs().max() < 1e-12
        upstream = torch.randn_like(got)
        found, true = (torch.autograd.grad((y * upstream).sum(), given, retain_graph=True) for y in (got, of_step))
        for mine, other in zip(found[:3], true[:3], strict=True):
            assert (mine - other).abs().max() < 1e-12
        if weighted:
            further = torch.arange(TOKENS * slots) % slots > 0
            assert (found[3] - true[3])[:, further].abs().max() < 1e-12


@pytest.mark.parametrize("segmented", [False, True])
def test_gradients_of_a_step_by_finite_differences(segmented):
    torch.manual_seed(1)
    shape = 2, 4, 2, 8
    q = torch.randn(2, 4, 4, 8, dtype=torch.float64, requires_grad=True)
    given = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for _ in range(6)]
    log_w = (-torch.rand(2, 4, 2, dtype=torch.float64)).requires_grad_()
    segments = Segments.of(torch.tensor([0, 3, 4, 8]), 8, 4) if segmented else None

    def form(q, log_w, *given):
        return latent_attention(q, given[:3], given[3:], SCALE, log_w, segments)

    assert torch.autograd.gradcheck(form, (q, log_w, *given))


def test_a_step_in_bf16_is_added_up_in_fp32():
    given = inputs_of(3, 2, weighted=False, dtype=torch.bfloat16)
    want = written_out(*(x.double() for x in given), SCALE, None, None, 3)
    q, k, v = (steps_of(x, 3) for x in given)
    got = latent_attention(q[2], k, v, SCALE, None, None)
    assert got.dtype == torch.bfloat16
    assert (got.double() - steps_of(want, 3)[2]).abs().max() < 0.02
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(got.sum(), given))


def test_a_compiler_sees_a_step_as_one_operation():
    *given, log_w = inputs_of(2, 2, weighted=True, dtype=torch.float32)
    weights = log_w.detach().unflatten(1, (-1, 2))[..., 1:].clone().requires_grad_()
    leaves = [x.detach().clone().requires_grad_() for whole in given for x in steps_of(whole, 2)]

    def form(q, k0, k1, v0, v1, log_w):
        return latent_attention(q, (k0, k1), (v0, v1), SCALE, log_w, None).sin()

    check_compiled(form, (*leaves[1:], weights))


def test_a_kernel_that_cannot_be_chosen_for_a_step():
    q, k, v = (steps_of(x, 2) for x in inputs_of(2, 2, weighted=False))
    with pytest.raises(UserError, match="attention_kernel varlen has every slot see all before it"):
        attend_latent(q[1], k, v, SCALE, kernel="varlen")
