"""Rotary position embedding: the angles of positions."""

import math

import torch
from torch import Tensor

from megatron_ponder.config import ModelConfig
from megatron_ponder.kernels.rotary import Rotation


def rotation(positions: Tensor, config: ModelConfig, dtype: torch.dtype) -> Rotation:
    """Angles of positions, each the position times the frequencies of a model.

    Args:
        positions: int64 (B or 1, T).
        config: resolved.
        dtype: of the activations; angles are computed in fp32, and in fp64 for fp64.
    """
    wide = torch.promote_types(dtype, torch.float32)
    exponents = torch.arange(0, config.rotated_channels, 2, device=positions.device, dtype=wide)
    frequencies = scaled(config.rope_theta ** -(exponents / config.rotated_channels), config)
    angles = positions.to(wide).unsqueeze(-1) * frequencies
    cos, sin = angles.cos().unsqueeze(2), angles.sin().unsqueeze(2)
    if config.rope_attention_factor is None:
        return Rotation(cos, sin)
    return Rotation(cos * config.rope_attention_factor, sin * config.rope_attention_factor)


def scaled(frequencies: Tensor, config: ModelConfig) -> Tensor:
    """θ^(−2i/rotated), (rotated / 2,), with those slowed down that the model's scaling of them says."""
    if config.rope_scaling == "none":
        return frequencies
    slowed = frequencies / config.rope_factor
    if config.rope_scaling == "linear":
        return slowed
    low, high = config.rope_low_turns, config.rope_high_turns
    if config.rope_scaling == "llama3":
        turns = config.rope_original_length / (2 * math.pi) * frequencies
        kept = ((turns - low) / (high - low)).clamp(0, 1)
    else:
        first, last = math.floor(_pair(high, config)), math.ceil(_pair(low, config))
        first, last = max(first, 0), min(last, config.rotated_channels - 1)
        pairs = torch.arange(len(frequencies), device=frequencies.device, dtype=frequencies.dtype)
        kept = 1 - ((pairs - first) / max(last - first, 1e-3)).clamp(0, 1)
    return slowed + kept * (frequencies - slowed)


def _pair(turns: float, config: ModelConfig) -> float:
    """The pair of channels, as a real number, whose frequency makes so many turns within the original length."""
    wavelength = config.rope_original_length / turns
    return config.rotated_channels * math.log(wavelength / (2 * math.pi)) / (2 * math.log(config.rope_theta))
