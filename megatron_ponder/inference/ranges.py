"""The numbers that an option may be, declared with its field."""

import re
from dataclasses import dataclass, field, fields
from typing import Any

from megatron_ponder.errors import UserError


@dataclass(frozen=True)
class Range:
    """Attributes:
    low, high: the least and the greatest.
    or_zero: 0 is allowed, which lies outside.
    """

    low: float
    high: float
    or_zero: bool = False

    def __contains__(self, value: float) -> bool:
        return self.low <= value <= self.high or (value == 0 and self.or_zero)

    def __str__(self) -> str:
        return f"{'0, or ' * self.or_zero}{written(self.low)} to {written(self.high)}"


def number_field(default: Any, low: float, high: float, or_zero: bool = False) -> Any:
    """A field of a dataclass for a number, or for several, with their range."""
    return field(default=default, metadata={"range": Range(low, high, or_zero)})


def same_field(kind: type, name: str, **default: Any) -> Any:
    """A field that another dataclass declares, with its range, and with its default unless one is given."""
    declared = next(item for item in fields(kind) if item.name == name)
    return field(**{"default": declared.default} | default, metadata=declared.metadata)


def range_of(kind: type, name: str) -> Range:
    """The range that a dataclass declares for a field."""
    return next(item.metadata["range"] for item in fields(kind) if item.name == name)


def check_ranges(options: Any) -> None:
    """Refuse a number that is not in the range of its field; None is none.

    Raises:
        UserError: for the first of them.
    """
    for item in fields(options):
        held, allowed = getattr(options, item.name), item.metadata.get("range")
        for value in () if allowed is None or held is None else held if isinstance(held, tuple) else (held,):
            if value not in allowed:
                raise UserError(f"{item.name} is {written(value)}; its range is {allowed}")


def written(value: float) -> str:
    """A number as people write it, shortened where it is absurd."""
    if isinstance(value, float):
        return re.sub(r"e([+-])0*", lambda sign: f"e{sign[1].strip('+')}", f"{value:.12g}")
    return f"{value:,}" if abs(value) < 10**20 else f"a number of {len(str(abs(value)))} digits"
