"""Reading micro-batches so that data that cannot be read leave no rank waiting."""

from collections.abc import Iterator

import torch
from torch import Tensor

from megatron_ponder.base.errors import UserError, describe


class CarefulReader:
    """Reads micro-batches; where that fails it gives zeros of their shape, so that other ranks are not left waiting.

    Attributes:
        problem: what went wrong, in one line; None so far.
    """

    def __init__(self, shape: tuple[int, int]) -> None:
        """Prepare.

        Args:
            shape: (B, L + 1) of what stands in for a micro-batch.
        """
        self._shape = shape
        self.problem: str | None = None

    def read(self, source: Iterator[list[Tensor]], count: int) -> list[Tensor]:
        """The next micro-batches of a source; so many of zeros once that has failed."""
        try:
            if self.problem is None:
                return next(source)
        except (UserError, OSError) as error:
            self.problem = describe(error)
        return [torch.zeros(self._shape, dtype=torch.long)] * count
