"""What is declared with a key beside its type: the range of a number, that a text is a path, and what may change."""

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass, replace
from types import MappingProxyType
from typing import Any

from megatron_ponder.base.errors import UserError
from megatron_ponder.base.paths import expand_user

STEPS = 10**12  # more than any run has of optimiser steps, samples, or what else is counted in them
SECONDS = 10**7  # a third of a year, more than anything here waits


@dataclass(frozen=True)
class Range:
    """The numbers that a key may have, both ends among them unless said otherwise.

    Attributes:
        low: the least.
        high: the greatest.
        above: `low` itself is left out.
        below: `high` itself is left out.
        or_zero: 0 is allowed, which lies outside.
    """

    low: float
    high: float
    above: bool = False
    below: bool = False
    or_zero: bool = False

    def __contains__(self, value: float) -> bool:
        least = self.low < value if self.above else self.low <= value
        return (value == 0 and self.or_zero) or (least and (value < self.high if self.below else value <= self.high))

    def __str__(self) -> str:
        zero, above, below = "0, or " * self.or_zero, "above " * self.above, "below " * self.below
        return f"{zero}{above}{written(self.low)} to {below}{written(self.high)}"


def number_field(default: Any, low: float, high: float, **ends: bool) -> Any:
    """A field of a dataclass for a number, or for a list of them, with their range; `ends` are those of `Range`."""
    return _declared(default, {"range": Range(low, high, **ends)})


def path_field(default: Any) -> Any:
    """A field of a dataclass for a path, in which ~ is expanded when the configuration is read."""
    return _declared(default, {"path": True})


def like(section: type, name: str) -> Any:
    """A field for another value of a key that is declared elsewhere, with all that is declared with it; None for none.

    Args:
        section: the dataclass that has the key.
        name: of the key.
    """
    return _declared(None, dict(section.__dataclass_fields__[name].metadata))


def changeable(item: Any) -> Any:
    """A field of what a model is, in which a run may differ from the checkpoint that it starts from."""
    item.metadata = MappingProxyType(item.metadata | {"changeable": True})
    return item


def range_of(item: Field) -> Range | None:
    """The range that is declared with a field."""
    return item.metadata.get("range")


def is_path(item: Field) -> bool:
    """Whether a field is declared to be a path."""
    return item.metadata.get("path", False)


def is_changeable(item: Field) -> bool:
    """Whether a run may differ in a field from the checkpoint that it starts from."""
    return item.metadata.get("changeable", False)


def check_ranges(section: Any, name: str = "") -> None:
    """Refuse a number out of the range declared for it, and an empty path, in a section and in all that it holds.

    Args:
        section: a dataclass.
        name: its key.

    Raises:
        UserError: for the first of them.
    """
    for item in fields(section):
        key = f"{name}.{item.name}" if name else item.name
        for place, value in _values_in(getattr(section, item.name), key):
            if is_dataclass(value):
                check_ranges(value, place)
            elif isinstance(value, (int, float)) and not isinstance(value, bool):
                allowed = range_of(item)
                assert allowed is not None, f"{key} is declared without a range"
                if value not in allowed:
                    raise UserError(f"{key} is {written(value)}; its range is {allowed}")
            elif value == "" and is_path(item) and item.default not in ("", MISSING):  # a shell's unset variable, say
                raise UserError(f"{key} is empty; name a file or a folder, or leave it out")


def expand_paths(section: Any) -> Any:
    """A copy of a section with ~ expanded in every path, also in those of what it holds."""
    return replace(
        section,
        **{
            item.name: _mapped(getattr(section, item.name), expand_user if is_path(item) else None)
            for item in fields(section)
        },
    )


def written(value: float) -> str:
    """A number as people write it, shortened where it is absurd."""
    if isinstance(value, int) and abs(value) >= 10**20:  # more than a float may hold, perhaps
        return f"a number of {int(math.log10(abs(value))) + 1} digits"
    round_ = abs(value) >= 10**9 and value % 10**9 == 0
    if isinstance(value, int) and not round_:
        return f"{value:,}"
    return re.sub(r"e([+-])0*", lambda sign: f"e{sign[1].strip('+')}", f"{value:g}" if round_ else f"{value:,.12g}")


def _declared(default: Any, metadata: dict) -> Any:
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: default.copy(), metadata=metadata)
    return field(default=default, metadata=metadata)


def _values_in(held: Any, place: str) -> Iterator[tuple[str, Any]]:
    """What a field holds, with its place: what lists and mappings hold one by one, and numbers that are keys."""
    if isinstance(held, dict):
        for key, value in held.items():
            if not isinstance(key, str):
                yield place, key
            yield from _values_in(value, f"{place}.{key}")
    elif isinstance(held, (list, tuple)):
        for position, value in enumerate(held):
            yield from _values_in(value, f"{place}[{position}]")
    else:
        yield place, held


def _mapped(value: Any, change: Callable[[str], str] | None) -> Any:
    """A value with its texts changed, and the paths expanded in the sections that it is or holds."""
    if is_dataclass(value):
        return expand_paths(value)
    if isinstance(value, list):
        return [_mapped(one, change) for one in value]
    if isinstance(value, dict):
        return {key: _mapped(one, change) for key, one in value.items()}
    return change(value) if change and isinstance(value, str) else value
