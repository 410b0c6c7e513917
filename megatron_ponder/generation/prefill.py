"""How prompts are read."""

from dataclasses import dataclass

from megatron_ponder.config.declarations import check_ranges, number_field


@dataclass(frozen=True)
class Prefill:
    """How prompts are read; `prompt_pieces.py` does it.

    Attributes:
        refinements: sweeps over every token after the first one; iterated to the fixed point unless given.
        tolerance: share of the largest hidden state; where none changes by more, the fixed point is reached. 16 units
            of rounding unless given.
        chunk: tokens of a prompt that are run together.
        shortest: prompts with fewer tokens left than this for each live sequence are read slot by slot, as generation
            goes on, which then costs less than iterating; no matter for a model without steps, which never iterates.
    """

    refinements: int | None = number_field(None, 0, 10**6)
    tolerance: float | None = number_field(None, 0, 1, below=True)
    chunk: int = number_field(128, 1, 10**6)
    shortest: int = number_field(24, 1, 10**6)

    def __post_init__(self) -> None:
        check_ranges(self)
