"""Where the slots of a batch are: their positions, and which of them see each other."""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_ponder.config import ModelConfig
from megatron_ponder.kernels.rotary import Rotation
from megatron_ponder.kernels.segments import Segments
from megatron_ponder.model.rope import rotation
from megatron_ponder.parallel.context import own_tokens, whole_rows
from megatron_ponder.parallel.mesh import Axis


@dataclass
class Geometry:
    """Positions and segments of a batch, for every number of slots a token that the passes use.

    Attributes:
        positions_BL: int64 (B or 1, L), the RoPE position of each token and of all its slots.
        segments_BL: int64 (B, L), number of the segment that a token and its slots belong to, which see no other; of
            context ranks that of the tokens of all. None if every sequence is one.
    """

    positions_BL: Tensor
    segments_BL: Tensor | None = None
    _angles: dict[int, Rotation] = field(default_factory=dict)
    _segments: dict[int, Segments] = field(default_factory=dict)

    @classmethod
    def of(cls, tokens_BL: Tensor, eod_id: int | None, context: Axis | None = None) -> "Geometry":
        """Positions 0, 1, .. of every sequence; with `eod_id`, a segment ends with each such token.

        Positions restart in every segment.

        Args:
            tokens_BL: of this rank's share of every sequence.
            eod_id: end-of-document token; None if nothing ends with it.
            context: the ranks that share the sequences; None for this one alone.
        """
        context = context or Axis()
        own = tokens_BL.shape[1]
        count = torch.arange(own * context.size, device=tokens_BL.device)
        if eod_id is None:
            return cls(count[own * context.rank :][:own].unsqueeze(0))
        ends = whole_rows((tokens_BL == eod_id).long(), context)
        segments = ends.cumsum(1) - ends
        first = torch.zeros_like(segments)
        first[:, 1:] = torch.where(ends[:, :-1] == 1, count[1:], 0)
        return cls(own_tokens(count - first.cummax(1).values, context), segments)

    @property
    def tokens(self) -> int:
        """L, of this rank's share."""
        return self.positions_BL.shape[1]

    def angles(self, slots: int, config: ModelConfig, dtype: torch.dtype) -> Rotation:
        """Rotations of the L · slots positions."""
        if slots not in self._angles:
            self._angles[slots] = rotation(self.positions_BL, config, dtype).repeat(slots)
        return self._angles[slots]

    def segments(self, slots: int) -> Segments | None:
        """Segments of the B · L · slots slots, rows one behind the other; None for plain causal attention."""
        if self.segments_BL is None:
            return None
        if slots not in self._segments:
            self._segments[slots] = self.segments(1).repeat(slots) if slots > 1 else self._of_tokens()
        return self._segments[slots]

    def _of_tokens(self) -> Segments:
        total, tokens = self.segments_BL.numel(), self.segments_BL.shape[1]
        first = torch.ones_like(self.segments_BL, dtype=torch.bool)
        first[:, 1:] = self.segments_BL.diff(dim=1) != 0
        begins = first.flatten().nonzero().squeeze(1)  # on a GPU the host waits here, once a micro-batch
        return Segments.of(F.pad(begins, (0, 1), value=total), total, tokens)
