"""Where the slots of a batch are: their positions, and which of them see each other."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from megatron_ponder.config import ModelConfig
from megatron_ponder.kernels.rotary import Rotation
from megatron_ponder.model.rope import rotation


@dataclass
class Geometry:
    """Positions and segments of a batch, for every number of slots a token that the passes use.

    Attributes:
        positions_BL: int64 (B or 1, L), the RoPE position of each token and of all its slots.
        segments_BL: int64 (B, L), number of the segment that a token and its slots belong to, which see no other; None
            if every sequence is one.
    """

    positions_BL: Tensor
    segments_BL: Tensor | None = None
    _angles: dict[int, Rotation] = field(default_factory=dict)
    _masks: dict[int, Tensor | None] = field(default_factory=dict)

    @classmethod
    def of(cls, tokens_BL: Tensor, eod_id: int | None) -> "Geometry":
        """Positions 0, 1, .. of every sequence; with `eod_id`, a segment ends with each such token.

        Positions restart in every segment.
        """
        count = torch.arange(tokens_BL.shape[1], device=tokens_BL.device)
        if eod_id is None:
            return cls(count.unsqueeze(0))
        ends = (tokens_BL == eod_id).long()
        segments = ends.cumsum(1) - ends
        first = torch.zeros_like(segments)
        first[:, 1:] = torch.where(ends[:, :-1] == 1, count[1:], 0)
        return cls(count - first.cummax(1).values, segments)

    @property
    def tokens(self) -> int:
        """L."""
        return self.positions_BL.shape[1]

    def angles(self, slots: int, config: ModelConfig, dtype: torch.dtype) -> Rotation:
        """Rotations of the L · slots positions."""
        if slots not in self._angles:
            base = rotation(self.positions_BL, config.rotated_channels, config.rope_theta, dtype)
            self._angles[slots] = base.repeat(slots)
        return self._angles[slots]

    def mask(self, slots: int) -> Tensor | None:
        """Causal attention within segments, bool (B, 1, L · slots, L · slots); None for plain causal attention."""
        if self.segments_BL is None:
            return None
        if slots not in self._masks:
            segments = self.segments_BL.repeat_interleave(slots, 1)
            same = segments.unsqueeze(2) == segments.unsqueeze(1)
            self._masks[slots] = same.tril().unsqueeze(1)
        return self._masks[slots]
