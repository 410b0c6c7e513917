"""Division of a checkpoint's bytes between the ranks that write or verify it."""

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

Item = TypeVar("Item")


def shared_out(items: Iterable[Item], size: Callable[[Item], int], ranks: int) -> Iterator[tuple[int, Item]]:
    """Share items out between ranks, each to the one that has the fewest bytes; alike on all that see the same sizes.

    No rank gets more than an even share and the largest item.

    Args:
        items: in an order that all ranks share.
        size: of an item in bytes.
        ranks: number of ranks.

    Returns:
        Each item with the rank that it belongs to.
    """
    loads = [0] * ranks
    for item in items:
        rank = loads.index(min(loads))
        loads[rank] += size(item)
        yield rank, item
