"""Counts as texts say them."""


def counted(number: int, noun: str) -> str:
    """A number with what it counts: 1 layer, 12,000 layers.

    Args:
        number: how many.
        noun: for one of them, whose plural takes an s, or es behind s and ch.
    """
    ending = "" if number == 1 else "es" if noun.endswith(("s", "ch")) else "s"
    return f"{number:,} {noun}{ending}"
