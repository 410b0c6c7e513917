"""Counts as texts say them."""

from collections.abc import Iterable


def counted(number: int, noun: str) -> str:
    """A number with what it counts: 1 layer, 12,000 layers.

    Args:
        number: how many.
        noun: for one of them, whose plural takes an s, or es behind s and ch.
    """
    ending = "" if number == 1 else "es" if noun.endswith(("s", "ch")) else "s"
    return f"{number:,} {noun}{ending}"


def first_of(names: Iterable[str], noun: str) -> str:
    """The first of some names, in their order, and how many there are besides: head.weight and 2 more tensors.

    Args:
        names: at least one.
        noun: for one of them, as of `counted`.
    """
    first, *others = sorted(names)
    return first + (f" and {counted(len(others), f'more {noun}')}" if others else "")
