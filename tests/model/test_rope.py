"""Rotary positions: the convention of the Hugging Face models of both families."""

import pytest
import torch
from torch import Tensor

from megatron_ponder.config import Config, ModelConfig, resolve
from megatron_ponder.kernels.rotary import Rotation, rotate
from megatron_ponder.model import rope


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rotation(positions: Tensor, rotated: int, theta: float, dtype: torch.dtype, **scaling) -> Rotation:
    """The angles of a model whose heads have so many rotated channels and no others."""
    model = ModelConfig(hidden_size=rotated, num_heads=1, rope_theta=theta, **scaling)
    return rope.rotation(positions, resolve(Config(model)).model, dtype)


def reference(x: Tensor, positions: Tensor, rotated: int, theta: float) -> Tensor:
    """By transformers, on the channels that are rotated; x is (B, T, heads, head size)."""
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    frequencies = 1.0 / theta ** (torch.arange(0, rotated, 2, dtype=torch.float64) / rotated)
    angles = positions.double().unsqueeze(-1) * frequencies
    both = torch.cat([angles, angles], -1)
    turned, _ = apply_rotary_pos_emb(x[..., :rotated], x[..., :rotated], both.cos(), both.sin(), unsqueeze_dim=2)
    return torch.cat([turned, x[..., rotated:]], -1)


@pytest.mark.parametrize(("head_size", "rotated"), [(8, 8), (64, 64), (64, 16), (80, 20), (6, 2)])
@pytest.mark.parametrize("theta", [1e4, 5e5])
def test_equals_transformers(head_size, rotated, theta):
    positions = torch.stack([torch.arange(9), torch.tensor([0, 1, 2, 0, 1, 2000, 2001, 0, 0])])
    x = random(2, 9, 3, head_size)
    got = rotate(x, rotation(positions, rotated, theta, x.dtype))
    torch.testing.assert_close(got, reference(x, positions, rotated, theta), rtol=1e-12, atol=1e-12)
    assert torch.equal(got[..., rotated:], x[..., rotated:])
    assert not torch.equal(got[:, 1:, :, :rotated], x[:, 1:, :, :rotated])


LLAMA3 = {"factor": 8.0, "original_max_position_embeddings": 64, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
SCALINGS = [
    ({"rope_factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
    ({"rope_factor": 8.0, "rope_original_length": 64}, {"rope_type": "llama3"} | LLAMA3),
    (
        {"rope_factor": 32.0, "rope_original_length": 500, "rope_low_turns": 2.0, "rope_high_turns": 9.0},
        {"rope_type": "llama3", "factor": 32.0, "original_max_position_embeddings": 500}
        | {"low_freq_factor": 2.0, "high_freq_factor": 9.0},
    ),
    (
        {"rope_factor": 4.0, "rope_original_length": 256},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256},
    ),
    (
        {"rope_factor": 40.0, "rope_original_length": 4096, "rope_low_turns": 0.5, "rope_high_turns": 60.0}
        | {"rope_attention_factor": 1.5},
        {"rope_type": "yarn", "factor": 40.0, "original_max_position_embeddings": 4096, "attention_factor": 1.5}
        | {"beta_slow": 0.5, "beta_fast": 60.0},
    ),
]


@pytest.mark.parametrize(("ours", "theirs"), SCALINGS)
@pytest.mark.parametrize(("channels", "theta"), [(16, 1e4), (64, 5e5)])
def test_scaled_frequencies_equal_transformers(channels, theta, ours, theirs):
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = LlamaConfig(
        hidden_size=channels,
        num_attention_heads=1,
        max_position_embeddings=10**5,
        rope_parameters=theirs | {"rope_theta": theta},
    )
    positions = torch.tensor([[0, 1, 2, 30, 500]])
    cos, sin = LlamaRotaryEmbedding(config)(torch.zeros(1), positions)
    got = rotation(positions, channels, theta, torch.float32, rope_scaling=theirs["rope_type"], **ours)
    torch.testing.assert_close(got.cos[0, :, 0], cos[0, :, : channels // 2], rtol=0, atol=1e-4)
    torch.testing.assert_close(got.sin[0, :, 0], sin[0, :, : channels // 2], rtol=0, atol=1e-4)
    plain = rotation(positions, channels, theta, torch.float32)
    assert (plain.cos - got.cos).abs().max() > 0.1


def test_scores_depend_on_the_distance_alone():
    q, k = random(1, 1, 1, 16), random(1, 1, 1, 16, seed=1)

    def score(at: int, to: int) -> Tensor:
        turned = (rotate(x, rotation(torch.tensor([[p]]), 16, 1e4, x.dtype)) for x, p in ((q, at), (k, to)))
        return torch.mul(*turned).sum()

    torch.testing.assert_close(score(5, 3), score(105, 103), rtol=1e-11, atol=1e-11)
    assert (score(5, 3) - score(5, 4)).abs() > 1e-3


def test_further_channels_are_appended_to_every_head():
    angles = rotation(torch.arange(5).unsqueeze(0), 4, 1e4, torch.float64)
    x, channels = random(2, 5, 3, 8), random(2, 5, 6, seed=1)
    y = rotate(x, angles, channels)
    assert torch.equal(y[..., :8], rotate(x, angles))
    assert torch.equal(y[..., 8:], channels.unsqueeze(2).expand(-1, -1, 3, -1))


@pytest.mark.parametrize("shape", [(2, 3, 4), (1, 1, 4)])
def test_gradients_by_finite_differences(shape):
    angles = rotation(torch.tensor([[0, 1, 7]]), 4, 1e4, torch.float64)
    x = random(2, 3, 2, 6).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: rotate(x, angles), x)
    if shape[0] == 2:
        assert torch.autograd.gradcheck(lambda x, c: rotate(x, angles, c), (x, random(*shape, seed=1).requires_grad_()))
    else:  # constants of the queries
        assert torch.autograd.gradcheck(lambda x: rotate(x, angles, random(*shape)), x)


@pytest.mark.parametrize("rotated", [16, 64])
def test_bf16_rounds_once(rotated):
    positions = torch.arange(2040, 2048).unsqueeze(0)
    x = random(1, 8, 2, 64).bfloat16()
    angles = rotation(positions, rotated, 1e4, x.dtype)
    assert angles.cos.dtype == torch.float32
    tangent = random(1, 8, 2, 64, seed=1).bfloat16()
    leaf = x.clone().requires_grad_()
    got = rotate(leaf, angles)
    got.backward(tangent)
    assert got.dtype == leaf.grad.dtype == torch.bfloat16
    expected = reference(x.double(), positions, rotated, 1e4)
    back = reference(tangent.double(), -positions, rotated, 1e4)  # the transpose of a rotation turns back
    for value, exact in ((got.detach(), expected), (leaf.grad, back)):
        torch.testing.assert_close(value.double(), exact, rtol=2**-8, atol=1e-3)


def test_slots_of_a_token_share_its_position():
    angles = rotation(torch.tensor([[0, 1, 5]]), 4, 1e4, torch.float64)
    assert angles.repeat(1) is angles
    expected = rotation(torch.tensor([[0, 0, 0, 1, 1, 1, 5, 5, 5]]), 4, 1e4, torch.float64)
    assert torch.equal(angles.repeat(3).cos, expected.cos)
    assert torch.equal(angles.repeat(3).sin, expected.sin)
