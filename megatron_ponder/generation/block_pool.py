"""Which blocks of the key-value pool each row of the cache holds, decided on the host.

Blocks in use are always the first ones: where some become free, the last ones take their places. So the pool can be
read as it lies, and the few blocks that move when a sequence leaves are less than one forward reads.
"""

import numpy as np

BLOCK = 32


def blocks_of(slots: np.ndarray | int) -> np.ndarray | int:
    """Blocks that so many slots need."""
    return -(-slots // BLOCK)


class BlockPool:
    """The blocks of all rows.

    Attributes:
        tables: int64 (rows, most blocks of a row), the blocks of each row in their order.
        owners: int64, the row of each block in use.
        used: how many blocks are in use.
    """

    def __init__(self, rows: int, row_slots: int) -> None:
        """Start with no block.

        Args:
            rows: of the cache.
            row_slots: most slots of one.
        """
        self.tables = np.zeros((rows, blocks_of(row_slots)), np.int64)
        self._held = np.zeros(rows, np.int64)
        self.owners = np.empty(0, np.int64)
        self._orders = np.empty(0, np.int64)  # of each block, which of its row's it is
        self.used = 0
        self._changed: list[np.ndarray] = []

    @property
    def capacity(self) -> int:
        """Blocks for which there is memory."""
        return len(self.owners)

    def resize(self, blocks: int) -> None:
        """Have memory for so many blocks, at least those in use."""
        for name in ("owners", "_orders"):
            array = np.full(blocks, -1)
            array[: self.used] = getattr(self, name)[: self.used]
            setattr(self, name, array)

    def missing(self, rows: np.ndarray, lengths: np.ndarray) -> int:
        """Blocks that rows lack for so many slots each."""
        return int((blocks_of(lengths) - self._held[rows]).clip(0).sum())

    def take(self, rows: np.ndarray, lengths: np.ndarray) -> slice:
        """Give rows the blocks that they lack, for which there is memory.

        Args:
            rows: each once.
            lengths: slots that they will hold.

        Returns:
            The new blocks.
        """
        counts = (blocks_of(lengths) - self._held[rows]).clip(0)
        begin = self.used
        for row, count in zip(rows[counts > 0].tolist(), counts[counts > 0].tolist(), strict=True):
            held, new = self._held[row], np.arange(self.used, self.used + count)
            orders = np.arange(held, held + count)
            self._put(row, orders, new)
            self._held[row] += count
            self.used += count
        assert self.used <= self.capacity
        return slice(begin, self.used)

    def release(self, rows: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Take from rows what they do not need for so many slots each.

        Args:
            rows: each once.
            lengths: slots that they hold on to.

        Returns:
            Blocks whose content is to move, and where to: none of these is among those.
        """
        kept = blocks_of(lengths)
        freed = [self.tables[row, keep : self._held[row]] for row, keep in zip(rows, kept, strict=True)]
        freed = np.concatenate(freed) if freed else np.empty(0, np.int64)
        self._held[rows] = np.minimum(self._held[rows], kept)
        self.owners[freed] = -1
        before, self.used = self.used, self.used - len(freed)
        holes = freed[freed < self.used]
        moved = self.used + np.flatnonzero(self.owners[self.used : before] >= 0)
        self._put(self.owners[moved], self._orders[moved], holes)
        return moved, holes

    def changes(self) -> tuple[np.ndarray, np.ndarray]:
        """Where tables, flattened, have changed since this was last asked, and what stands there now."""
        places = np.unique(np.concatenate(self._changed)) if self._changed else np.empty(0, np.int64)
        self._changed = []
        return places, self.tables.reshape(-1)[places]

    def _put(self, rows: np.ndarray | int, orders: np.ndarray, blocks: np.ndarray) -> None:
        """Say of blocks whose they are."""
        self.tables[rows, orders] = blocks
        self.owners[blocks], self._orders[blocks] = rows, orders
        self._changed.append(rows * self.tables.shape[1] + orders)
