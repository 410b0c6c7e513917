"""Rotary position embedding: the angles of positions."""

import torch
from torch import Tensor

from megatron_ponder.kernels.rotary import Rotation


def rotation(positions: Tensor, rotated: int, theta: float, dtype: torch.dtype) -> Rotation:
    """Angles p · θ^(−2i/rotated).

    Args:
        positions: int64 (B or 1, T).
        rotated: channels of a head that are rotated, an even number.
        theta: base of the frequencies.
        dtype: of the activations; angles are computed in fp32, and in fp64 for fp64.
    """
    wide = torch.promote_types(dtype, torch.float32)
    exponents = torch.arange(0, rotated, 2, device=positions.device, dtype=wide) / rotated
    angles = positions.to(wide).unsqueeze(-1) * theta**-exponents
    return Rotation(angles.cos().unsqueeze(2), angles.sin().unsqueeze(2))
