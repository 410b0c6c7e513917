"""Who sees whom: runs of slots of which each sees itself and those before it in its run."""

from typing import NamedTuple

import torch
from torch import Tensor


class Segments(NamedTuple):
    """Segments of T slots: the rows of a batch one behind the other, each of one segment or several.

    Attributes:
        bounds: int32 (n + 1,), cumulative lengths 0, .., T.
        starts: int32 (T,), of each slot the first of its segment.
        ends: int32 (T,), of each slot the one behind the last of its segment.
        longest: slots that no segment has more of.
    """

    bounds: Tensor
    starts: Tensor
    ends: Tensor
    longest: int

    @classmethod
    def of(cls, bounds: Tensor, total: int, longest: int) -> "Segments":
        """Segments from their cumulative lengths.

        Args:
            bounds: int (n + 1,), from 0 to T, rising.
            total: T.
            longest: slots that no segment has more of.
        """
        bounds = bounds.to(torch.int32)
        lengths = bounds.diff()
        starts, ends = (x.repeat_interleave(lengths, output_size=total) for x in (bounds[:-1], bounds[1:]))
        return cls(bounds, starts, ends, longest)

    def repeat(self, slots: int) -> "Segments":
        """The segments of so many slots for each of these."""
        if slots == 1:
            return self
        starts, ends = (slots * x.repeat_interleave(slots) for x in (self.starts, self.ends))
        return Segments(slots * self.bounds, starts, ends, slots * self.longest)
