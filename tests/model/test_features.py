"""Every combination of features computes its formula, and a mixed one decodes as its fixed point."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from megatron_ponder.config import Config, ModelConfig, resolve
from megatron_ponder.model.attention import Slots
from megatron_ponder.model.block import Block
from megatron_ponder.model.rope import rotation
from megatron_ponder.parallel.mesh import Axis
from tests.generation.sequential import decode
from tests.models import MIXED, random_tokens, small_model

HIDDEN, HEADS, LENGTH = 32, 4, 7
CHOICES = {
    "norm": ("rms", "layer"),
    "gated_ffn": (True, False),
    "activation": ("silu", "gelu"),
    "biases": ("none", "qkv", "all"),
    "rotary_fraction": (1.0, 0.5),
    "residual": ("sequential", "parallel"),
    "num_kv_heads": (4, 2),
}
# Further ones, of which each combination has one set, in turns that no other feature takes.
FURTHER = (
    {"qk_norm": True},
    {"head_size": 12},
    {"activation": "gelu_tanh"},
    {"qk_norm": True, "head_size": 4},
    {"rope_scaling": "linear", "rope_factor": 4.0},
)
COMBINATIONS = [
    dict(zip(CHOICES, values, strict=True)) | FURTHER[index % len(FURTHER)]
    for index, values in enumerate(itertools.product(*CHOICES.values()))
]


def linear(layer, x: Tensor) -> Tensor:
    return x @ layer.weight.T + (0 if layer.bias is None else layer.bias)


def normed(config: ModelConfig, norm, x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True) if config.norm == "layer" else x
    y = centred / (centred.square().mean(-1, keepdim=True) + config.norm_epsilon).sqrt() * norm.weight
    return y + norm.bias if config.norm == "layer" else y


def turned(config: ModelConfig, x: Tensor) -> Tensor:
    """Of (T, heads, head size) the first channels rotated by position."""
    channels = int(x.shape[-1] * config.rotary_fraction)
    half = channels // 2
    frequencies = 10000.0 ** -(torch.arange(half, dtype=x.dtype) / half) / (config.rope_factor or 1)
    phase = torch.polar(torch.ones(LENGTH, half, dtype=x.dtype), torch.arange(LENGTH)[:, None] * frequencies)
    y = torch.complex(x[..., :half], x[..., half:channels]) * phase[:, None]
    return torch.cat([y.real, y.imag, x[..., channels:]], -1)


def attended(config: ModelConfig, layer, x: Tensor) -> Tensor:
    size = config.head_size
    q, k, v = (linear(part, x).view(LENGTH, -1, size) for part in (layer.q_proj, layer.k_proj, layer.v_proj))
    if config.qk_norm:
        norm = lambda y, g: y / (y.square().mean(-1, keepdim=True) + config.norm_epsilon).sqrt() * g
        q, k = norm(q, layer.q_norm.weight), norm(k, layer.k_norm.weight)
    q, k = turned(config, q), turned(config, k)
    k, v = (y.repeat_interleave(HEADS // config.num_kv_heads, 1) for y in (k, v))
    logits = torch.einsum("tnd,snd->nts", q, k) / math.sqrt(size)
    hidden = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)
    y = torch.einsum("nts,snd->tnd", logits.masked_fill(hidden, -torch.inf).softmax(-1), v)
    return linear(layer.o_proj, y.flatten(1))


def fed(config: ModelConfig, layer, x: Tensor) -> Tensor:
    act = {
        "silu": lambda y: y * y.sigmoid(),
        "gelu": lambda y: y * 0.5 * (1 + torch.erf(y / 2**0.5)),
        "gelu_tanh": lambda y: y * 0.5 * (1 + torch.tanh((2 / math.pi) ** 0.5 * (y + 0.044715 * y**3))),
    }[config.activation]
    up = linear(layer.up_proj, x)
    return linear(layer.down_proj, act(linear(layer.gate_proj, x)) * up if config.gated_ffn else act(up))


@pytest.mark.parametrize("norm", CHOICES["norm"])
@pytest.mark.parametrize("residual", CHOICES["residual"])
def test_every_combination_is_its_formula(norm, residual):
    x = torch.randn(LENGTH, HIDDEN, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for features in COMBINATIONS:
        if (features["norm"], features["residual"]) != (norm, residual):
            continue
        given = ModelConfig(hidden_size=HIDDEN, num_heads=HEADS, ffn_hidden_size=48, **features)
        config = resolve(Config(given)).model
        block = Block(config, Axis()).double()
        for index, parameter in enumerate(block.parameters()):
            generator = torch.Generator().manual_seed(index)
            torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5, generator=generator)
        angles = rotation(torch.arange(LENGTH).unsqueeze(0), config, x.dtype)
        got = block(x.unsqueeze(0), Slots(LENGTH, angles))[0]
        changed = x + attended(config, block.attention, normed(config, block.attention_norm, x))
        read = x if residual == "parallel" else changed
        expected = changed + fed(config, block.mlp, normed(config, block.mlp_norm, read))
        assert (got - expected).abs().max() < 1e-12, features
        biases = {name for name, _ in block.named_parameters() if name.endswith("proj.bias")}
        assert len(biases) == {"none": 0, "qkv": 3, "all": 7 if config.gated_ffn else 6}[config.biases]


@pytest.mark.parametrize("mode", ["fixed", "adaptive"])
def test_a_mixture_decodes_as_its_fixed_point(mode):
    model = small_model(router_scale=4.0, ponder__mode=mode, **MIXED)
    tokens, rule = random_tokens(1, 20), model.rule("hard", threshold=0.3)
    want, executed = decode(model, rule, tokens[0])
    got = model.exact(tokens, rule)
    assert (model.head(got.output_BLH[0]) - model.head(want)).abs().max() < 1e-9
    assert mode == "fixed" or len(executed.unique()) > 1
    jacobi = model.jacobi(tokens, 60, rule)
    assert (jacobi.output_BLH - got.output_BLH).abs().max() < 1e-9
