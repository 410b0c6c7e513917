"""Folded attention equals the explicit mask, in outputs and gradients, for every weight that a router can give."""

import math

import pytest
import torch
from torch import Tensor

from megatron_ponder.config import Config, ModelConfig, resolve
from megatron_ponder.kernels.attention import DEAD, FOLDED_CHANNELS, key_channels, query_channels
from megatron_ponder.kernels.segments import Segments
from megatron_ponder.model.attention import Attention, Slots
from megatron_ponder.model.rope import rotation
from megatron_ponder.model.router import Rule, route
from megatron_ponder.parallel.mesh import Axis
from megatron_ponder.parallel.sharding import initialize

BATCH, LENGTH = 2, 12


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def build(heads: int = 4, kv_heads: int = 4, head_size: int = 8, family: str = "llama") -> Attention:
    """A layer whose logits are of order 1."""
    given = ModelConfig(
        family=family,
        hidden_size=heads * head_size,
        num_layers=1,
        num_heads=heads,
        num_kv_heads=kv_heads,
        init_std=(heads * head_size) ** -0.5,
    )
    model = resolve(Config(given)).model
    layer = Attention(model, Axis()).double()
    layer.config, layer.rotated = model, model.rotated_channels
    initialize(layer, seed=1)
    return layer


def slots_for(layer: Attention, dtype: torch.dtype, log_w: Tensor | None, segments: Segments | None = None) -> Slots:
    angles = rotation(torch.arange(LENGTH).unsqueeze(0), layer.config, dtype)
    return Slots(LENGTH, angles, log_w, segments)


def turn(x: Tensor, rotated: int) -> Tensor:
    """Rotary embedding by complex numbers: channel i of the first half goes with channel i of the second."""
    half = rotated // 2
    frequencies = 10000.0 ** -(torch.arange(half, dtype=torch.float64) / half)
    phase = torch.polar(torch.ones(LENGTH, half, dtype=torch.float64), torch.arange(LENGTH)[:, None] * frequencies)
    turned = torch.complex(x[..., :half], x[..., half:rotated]) * phase[None, :, None]
    return torch.cat([turned.real, turned.imag, x[..., rotated:]], -1)


def oracle(layer: Attention, x: Tensor, log_w: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(q·k/√d + log w + causal mask) v, with the T × T mask that the package never makes, in fp64."""
    q, k, v = (proj(x).unflatten(-1, (-1, layer.head_size)) for proj in (layer.q_proj, layer.k_proj, layer.v_proj))
    q, k = turn(q, layer.rotated), turn(k, layer.rotated)
    k, v = (tensor.repeat_interleave(q.shape[2] // k.shape[2], 2) for tensor in (k, v))
    logits = torch.einsum("btnd,bsnd->bnts", q, k) / math.sqrt(layer.head_size) + log_w[:, None, None, :]
    visible = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril() if mask is None else mask
    probabilities = logits.masked_fill(~visible, -torch.inf).softmax(-1)
    return layer.o_proj(torch.einsum("bnts,bsnd->btnd", probabilities, v).flatten(2), LENGTH)


def random_log_w() -> Tensor:
    """From 0, as token slots have it, down to e^-20."""
    log_w = -20 * torch.rand(BATCH, LENGTH, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    log_w[:, ::3] = 0
    return log_w


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (3, 1)])
@pytest.mark.parametrize("head_size", [8, 24, 64])
@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
@pytest.mark.parametrize("documents", [False, True])
def test_folded_equals_explicit_mask(dtype, tolerance, heads, kv_heads, head_size, family, documents):
    layer = build(heads, kv_heads, head_size, family)
    mask = segments = None
    if documents:  # two in each of both sequences
        segments = Segments.of(torch.tensor([0, 5, 12, 17, 24]), BATCH * LENGTH, LENGTH)
        document = (torch.arange(LENGTH) > 4).long()
        mask = ((document[:, None] == document) & torch.ones(LENGTH, LENGTH).tril().bool()).expand(BATCH, 1, -1, -1)
    results = []
    for kind in (dtype, torch.float64):
        layer.to(kind)
        layer.zero_grad()
        x = random(BATCH, LENGTH, heads * head_size).to(kind).requires_grad_()
        log_w = random_log_w().to(kind).requires_grad_()
        if not results:
            y = layer(x, slots_for(layer, kind, log_w, segments))
        else:
            y = oracle(layer, x, log_w, mask)
        (y * random(*y.shape, seed=2).to(kind)).sum().backward()
        gradients = {name: parameter.grad.clone() for name, parameter in layer.named_parameters()}
        results.append({"y": y.detach(), "x": x.grad, "log w": log_w.grad, **gradients})
    got, expected = results
    for name, value in expected.items():
        assert (got[name] - value).abs().max() <= tolerance * max(value.abs().max(), 1e-3), name
        assert value.abs().max() > 0, name


def test_weights_of_one_change_nothing():
    layer = build()
    x = random(BATCH, LENGTH, 32)
    zeros = torch.zeros(BATCH, LENGTH, dtype=torch.float64)
    plain, folded = (layer(x, slots_for(layer, x.dtype, log_w)) for log_w in (None, zeros))
    torch.testing.assert_close(folded, plain, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("log_weight", [-5.0, -30.0, -69.0])  # e^-69 is 1e-30
@pytest.mark.parametrize("head_size", [8, 24])
def test_faint_steps_keep_their_gradient(log_weight, head_size):
    """In fp32, from the router's logits through route() and attention; token slots keep weight 1."""
    layer = build(head_size=head_size)
    gradients = []
    for dtype in (torch.float32, torch.float64):
        layer.to(dtype)
        logits = torch.tensor([0.0, log_weight / 2, log_weight]) + 0.1 * random(BATCH, LENGTH // 3, 3, seed=4)
        logits = logits.to(dtype).requires_grad_()
        log_w = route(logits, Rule("soft", threshold=1e-4)).log_w.flatten(1)
        x = random(BATCH, LENGTH, 4 * head_size).to(dtype)
        y = layer(x, slots_for(layer, dtype, log_w)) if dtype == torch.float32 else oracle(layer, x, log_w)
        (y * random(*y.shape, seed=2).to(dtype)).sum().backward()
        gradients.append(logits.grad.double())
    got, expected = gradients
    for step, size in ((1, log_weight / 2), (2, log_weight)):
        exact = expected[..., step]
        assert 0.01 * math.exp(size) < exact.abs().max() < 100 * math.exp(size)  # as faint as the key
        torch.testing.assert_close(got[..., step], exact, rtol=1e-3, atol=1e-4 * exact.abs().max().item())
        assert got[..., step].all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head_size", [8, 24, 64])
def test_a_dead_key_is_not_there(dtype, head_size):
    layer = build(head_size=head_size).to(dtype)
    dead = [2, 3, 7]
    log_w = random_log_w().to(torch.promote_types(dtype, torch.float32))
    log_w[:, dead] = DEAD
    x = random(BATCH, LENGTH, 4 * head_size).to(dtype)
    other = x.clone()
    other[:, dead] = 30 * random(BATCH, len(dead), 4 * head_size, seed=9).to(dtype)
    alive = [slot for slot in range(LENGTH) if slot not in dead]
    with torch.no_grad():
        first, second = (layer(inputs, slots_for(layer, dtype, log_w))[:, alive] for inputs in (x, other))
    assert first.isfinite().all()
    assert torch.equal(first, second)


@pytest.mark.parametrize("head_size", [8, 24, 64, 80, 128])
def test_two_channels_keep_what_bf16_loses(head_size):
    log_w = random_log_w().float()
    query = query_channels(torch.empty(0, dtype=torch.bfloat16), head_size).double()[0, 0]
    keys = key_channels(log_w, head_size, torch.bfloat16).double()
    assert keys.shape == (BATCH, LENGTH, FOLDED_CHANNELS)
    both = (keys * query).sum(-1) / math.sqrt(head_size)
    high_alone = keys[..., 0] * query[0] / math.sqrt(head_size)
    error, error_alone = ((bias - log_w).abs().max() for bias in (both, high_alone))
    assert error < 20 * 2**-16
    assert error_alone > 50 * error


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_channel_is_exact_in_wide_types(dtype):
    log_w = random_log_w().to(dtype)
    keys = key_channels(log_w, 24, dtype)
    assert not keys[..., 1:].any()
    bias = (keys * query_channels(keys.new_empty(0), 24)).sum(-1) / math.sqrt(24)
    torch.testing.assert_close(bias, log_w)


def test_two_channels_show_in_bf16_outputs():
    layer = build(head_size=64).to(torch.bfloat16)
    log_w, x = random_log_w().float(), torch.zeros(BATCH, LENGTH, 256, dtype=torch.bfloat16)
    x[..., 0] = torch.linspace(-4, 4, LENGTH)
    with torch.no_grad():
        layer.q_proj.weight.zero_()  # logits are log w alone
        got, rounded = (layer(x, slots_for(layer, x.dtype, bias)) for bias in (log_w, log_w.bfloat16().float()))
        expected = oracle(layer.double(), x.double(), log_w.double())
    assert (got - expected).square().mean() < (rounded - expected).square().mean()
