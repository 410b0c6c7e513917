"""Keys and values of executed slots, in blocks of a pool: a sequence holds as many as it has slots for.

On a GPU the pool has a fixed size, and kernels find blocks by tables. On a CPU it grows and shrinks with what is in it,
and is read as it lies.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from megatron_ponder.config import ModelConfig
from megatron_ponder.generation.block_pool import BLOCK, BlockPool, blocks_of
from megatron_ponder.generation.forward import NOTHING, Finished, Forward, PromptSlots, Segment
from megatron_ponder.generation.slot_numbers import SlotNumbers, upload
from megatron_ponder.kernels.attention import DEAD
from megatron_ponder.kernels.cached_attention import VisibleKeys, attend_seen
from megatron_ponder.kernels.decoding import StoredBlocks, attend_owned, for_heads
from megatron_ponder.kernels.paged_attention import Pages, attend_pages
from megatron_ponder.parallel.mesh import Axis


class Owned(NamedTuple):
    """StoredBlocks of the sequences that decode, read where they lie.

    Attributes:
        read: which; a slice where they are all that are in use, which copies nothing.
        owners_n: int64, the decoding slot that each belongs to.
        log_w_x1b: their log weights for all heads.
    """

    read: slice | Tensor
    owners_n: Tensor
    log_w_x1b: Tensor


class Reading(NamedTuple):
    """Slots of a prompt.

    Attributes:
        at: in the forward.
        table_n: int64, blocks of its sequence.
        sees: which of their places each slot sees, and what they weigh.
    """

    at: slice
    table_n: Tensor
    sees: VisibleKeys


class Placed(NamedTuple):
    """Where the slots of a forward go, and what they see.

    Attributes:
        slots: their numbers on the device.
        decoding: how many slots decode, before those of prompts.
        owned: what they see; None where tables say it.
        prompts: those that are read.
        unused: slots behind them, of no sequence.
    """

    slots: SlotNumbers
    decoding: int
    owned: Owned | None
    prompts: list[Reading]
    unused: int = 0


class BlockCache:
    """The cache of one rank's layers and heads.

    Attributes:
        pool: which blocks rows hold.
        tables_rW: the same on the device; in a pool of a fixed size a last row, of no sequence, has a block of its own.
        layers: one view a layer, with the `attend` that attention calls.
        placed: slots of the forward that runs.
    """

    def __init__(
        self,
        config: ModelConfig,
        num_layers: int,
        axis: Axis,
        rows: int,
        row_slots: int,
        weighted: bool,
        like: Tensor,
        blocks: int | None = None,
    ) -> None:
        """Make an empty cache.

        Args:
            config: of the model.
            num_layers: of this rank.
            axis: the tensor ranks, which share the heads.
            rows: that may be live.
            row_slots: most slots of one.
            weighted: whether keys have other weights than 1.
            like: device and type of the keys.
            blocks: of the pool; as many as are needed unless given.
        """
        self._heads, self._weighted = config.num_kv_heads // axis.size, weighted
        self.fixed = blocks is not None
        self.pool = BlockPool(rows + self.fixed, row_slots)
        shape, wide = (self._heads, BLOCK, config.head_size), torch.promote_types(like.dtype, torch.float32)
        places = blocks + 1 if self.fixed else 0
        self.keys, self.values = (like.new_empty(num_layers, places, *shape) for _ in "kv")
        self.log_w = torch.empty(places, BLOCK, dtype=wide, device=like.device)
        if self.fixed:
            self.pool.resize(blocks)
            self.pool.tables[-1] = blocks
        self.tables_rW = torch.from_numpy(self.pool.tables).to(like.device)
        self._written = np.zeros(rows, np.int64)
        self._prefixes: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
        self.placed: Placed | None = None
        self.layers = [_Layer(self, layer) for layer in range(num_layers)]

    @property
    def capacity(self) -> int:
        """Slots for which there is memory."""
        return self.pool.capacity * BLOCK

    @property
    def reserved(self) -> int:
        """Slots of the blocks that sequences hold."""
        return self.pool.used * BLOCK

    @property
    def unused_slot(self) -> SlotNumbers:
        """Numbers of a slot of no sequence, in a pool of a fixed size."""
        assert self.fixed
        return SlotNumbers(0, 0, 0, 0, 0, len(self.tables_rW) - 1, self.pool.capacity, 0, 1)

    def prepare(self, forward: Forward) -> SlotNumbers | None:
        """Store, free and load what a forward says, and make room for its slots.

        Returns:
            Numbers of the slots, for `place`; None if there are none.
        """
        for finished in forward.finished:
            self._move(finished)
        for key, row, slots in forward.stored:
            self._prefixes[key] = self._read(row, slots)
        for key in forward.dropped:
            del self._prefixes[key]
        if forward.cleared:
            rows = np.unique(forward.cleared)
            self._hold(rows, np.zeros_like(rows))
        if forward.loaded:
            keys, rows, lengths = np.array(forward.loaded).T
            self._hold(rows, lengths)
            for key, row, length in zip(keys.tolist(), rows, lengths.tolist(), strict=True):
                self._write(row, length, self._prefixes[key])
        numbers = None
        if forward:
            rows, starts, counts = np.array(forward.segments).T
            lengths = starts + counts
            for index, prompt in enumerate(forward.prompts, len(forward.steps)):
                if prompt.window is not None:
                    lengths[index] = len(prompt.window.orders)
            self._hold(rows, lengths)
            numbers = SlotNumbers.of(forward, self.pool)
        places, blocks = self.pool.changes()
        if len(places) and self.tables_rW.is_cuda:
            places, blocks = upload([places, blocks], self.tables_rW.device)
            self.tables_rW.view(-1)[places] = blocks
        return numbers

    def place(self, slots: SlotNumbers, forward: Forward) -> None:
        """Take the log weights of slots whose numbers have arrived, and what they see; further ones see nothing."""
        decoding = len(forward.steps)
        self.place_decoding(slots)
        prompts = [
            self._reading(prompt, segment)
            for prompt, segment in zip(forward.prompts, forward.segments[decoding:], strict=True)
        ]
        owned = self._owned(forward, decoding) if decoding and not self.fixed else None
        self.placed = Placed(slots, decoding, owned, prompts, len(slots.rows) - len(forward))

    def place_decoding(self, slots: SlotNumbers) -> None:
        """The same of slots that all decode, with nothing that depends on which they are."""
        self.log_w[slots.blocks, slots.places] = slots.log_weights(self.log_w.dtype)
        self.placed = Placed(slots, len(slots.rows), None, [])

    def _reading(self, prompt: PromptSlots, segment: Segment) -> Reading:
        row, start, count = segment
        apart = None  # of every place, whether its slot is seen by the token alone whose number stands in `every`
        if prompt.apart is not None:
            final, tokens, first = prompt.apart
            table = self.pool.tables[row, : blocks_of(start + count)]
            every = np.full(len(table) * BLOCK, NOTHING)
            every[: start + count] = [-1] * final + tokens
            apart, orders = np.arange(len(every)) >= final + first, np.array(tokens)[start - final :]
        elif prompt.window is None:
            table, orders = self.pool.tables[row, : blocks_of(start + count)], np.arange(start, start + count)
            every = np.arange(len(table) * BLOCK)
        else:
            window, blocks = prompt.window, blocks_of(prompt.window.final)
            table = np.append(
                self.pool.tables[window.row, :blocks], self.pool.tables[row, : blocks_of(len(window.orders))]
            )
            every = np.full(len(table) * BLOCK, NOTHING)
            every[: window.final] = -1
            every[blocks * BLOCK :][: len(window.orders)] = window.orders
            orders = np.array(window.orders)[window.places]
        table_n, every_S, orders_T = upload([table, every, orders], self.log_w.device)
        log_w_S = self.log_w[table_n].flatten() if self._weighted else None
        seen_TS = every_S <= orders_T[:, None]
        if apart is not None:
            apart_S = upload([apart.astype(np.int64)], self.log_w.device)[0] > 0
            seen_TS &= ~apart_S | (every_S == orders_T[:, None])
        sees = VisibleKeys.of(seen_TS, log_w_S, self.keys)
        return Reading(slice(prompt.at, prompt.at + prompt.count), table_n, sees)

    def _move(self, finished: Finished) -> None:
        """Put slots of a window behind those of its sequence that were final before."""
        window, places, row, start = finished
        places, behind = np.array(places), np.arange(start, start + len(places))
        self._hold(np.array([row]), np.array([start + len(places)]))
        tables = self.pool.tables
        numbers = [tables[window, places // BLOCK], places % BLOCK, tables[row, behind // BLOCK], behind % BLOCK]
        from_blocks, from_places, blocks, places = upload(numbers, self.log_w.device)
        for tensor in (self.keys, self.values):
            tensor[:, blocks, :, places] = tensor[:, from_blocks, :, from_places]
        self.log_w[blocks, places] = self.log_w[from_blocks, from_places]

    def _owned(self, forward: Forward, decoding: int) -> Owned:
        queries = np.full(len(self.pool.tables), -1)
        queries[[segment.row for segment in forward.segments[:decoding]]] = np.arange(decoding)
        owners = queries[self.pool.owners[: self.pool.used]]
        present = owners >= 0
        # All blocks, as a view, where every live sequence decodes; a selection copies.
        if present.all():
            read, owners = slice(self.pool.used), upload([owners], self.log_w.device)[0]
        else:
            read, owners = upload([present.nonzero()[0], owners[present]], self.log_w.device)
        return Owned(read, owners, for_heads(self.log_w[read], self._heads))

    def _hold(self, rows: np.ndarray, lengths: np.ndarray) -> None:
        """Give rows the blocks that so many slots need, and no more."""
        shorter = lengths < self._written[rows]
        if shorter.any():
            sources, targets = self.pool.release(rows[shorter], lengths[shorter])
            if len(sources):
                sources, targets = upload([sources, targets], self.keys.device)
                for tensor in (self.keys.transpose(0, 1), self.values.transpose(0, 1), self.log_w):
                    tensor[targets] = tensor[sources]
            if not self.fixed:
                self._hide(rows[shorter], lengths[shorter])
        missing = self.pool.missing(rows, lengths)
        if not self.fixed:
            self._fit(self.pool.used + missing)
        if missing:
            new = self.pool.take(rows, lengths)
            # What is read as it lies, and was never written, must be numbers and weigh nothing.
            self.keys[:, new], self.values[:, new], self.log_w[new] = 0, 0, DEAD
        self._written[rows] = lengths

    def _hide(self, rows: np.ndarray, lengths: np.ndarray) -> None:
        """Let what rows have written behind their slots weigh nothing, where it is read as it lies."""
        counts = (np.minimum(self._written[rows], blocks_of(lengths) * BLOCK) - lengths).clip(0)
        rows, places = np.repeat(rows, counts), np.repeat(lengths - counts.cumsum() + counts, counts)
        places += np.arange(len(places))
        self.log_w[self.pool.tables[rows, places // BLOCK], places % BLOCK] = DEAD

    def _read(self, row: int, slots: int) -> tuple[Tensor, Tensor, Tensor]:
        """Copies of the blocks of the first slots of a row."""
        table = self.tables_rW[row, : blocks_of(slots)]
        return self.keys[:, table], self.values[:, table], self.log_w[table]

    def _write(self, row: int, slots: int, stored: tuple[Tensor, Tensor, Tensor]) -> None:
        """Fill the blocks of a row, which are new, with the first slots of what `_read` read."""
        keys, values, log_w = stored
        table = self.pool.tables[row]
        for number in range(blocks_of(slots)):
            block, count = table[number], min(BLOCK, slots - number * BLOCK)
            self.keys[:, block, :, :count] = keys[:, number, :, :count]
            self.values[:, block, :, :count] = values[:, number, :, :count]
            self.log_w[block, :count] = log_w[number, :count]

    def _fit(self, needed: int) -> None:
        """Grow, or shrink where most is unused; to twice what is needed, so that it happens rarely."""
        if self.pool.capacity // 4 <= needed <= self.pool.capacity:
            return
        blocks = 2 * needed
        self.pool.resize(blocks)
        used = slice(self.pool.used)
        for name, dim in (("keys", 1), ("values", 1), ("log_w", 0)):
            old = getattr(self, name)
            new = old.new_empty(*old.shape[:dim], blocks, *old.shape[dim + 1 :])
            new.transpose(0, dim)[used] = old.transpose(0, dim)[used]
            setattr(self, name, new)


class _Layer:
    """One layer of the cache: `LayerCache` for the forward whose slots were placed."""

    def __init__(self, cache: BlockCache, layer: int) -> None:
        self._cache, self._layer = cache, layer

    def attend(self, q_BTND: Tensor, k_BTMD: Tensor, v_BTMD: Tensor, scale: float) -> Tensor:
        slots, decoding, owned, prompts, unused = self._cache.placed
        keys, values = self._cache.keys[self._layer], self._cache.values[self._layer]
        keys[slots.blocks, :, slots.places] = k_BTMD[0]
        values[slots.blocks, :, slots.places] = v_BTMD[0]
        parts = []
        if decoding and self._cache.fixed:
            sees = slots.rows[:decoding], slots.lengths[:decoding]
            pages = Pages(keys, values, self._cache.log_w, self._cache.tables_rW, *sees)
            parts.append(attend_pages(q_BTND[0, :decoding], pages, scale))
        elif decoding:
            blocks = StoredBlocks(keys[owned.read], values[owned.read], owned.log_w_x1b)
            parts.append(attend_owned(q_BTND[0, :decoding], blocks, owned.owners_n, scale))
        for at, table_n, sees in prompts:
            k_MSD, v_MSD = (x.transpose(0, 1).index_select(1, table_n).flatten(1, 2) for x in (keys, values))
            parts.append(attend_seen(q_BTND[0, at], k_MSD, v_MSD, scale, sees))
        if unused:
            parts.append(q_BTND.new_zeros(unused, *q_BTND.shape[2:]))
        return (parts[0] if len(parts) == 1 else torch.cat(parts)).unsqueeze(0)
