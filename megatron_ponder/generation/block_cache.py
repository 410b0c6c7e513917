"""Keys and values of executed slots, in blocks: a sequence holds as many as it has slots for.

Blocks in use are always the first ones of the pool: a sequence that leaves has its blocks taken over by the last ones.
So decoding reads the pool as it lies, with no copy and no padding but the rest of each sequence's last block, whose
keys have weight 0 through the folded channel.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_ponder.config import ModelConfig
from megatron_ponder.generation.forward import Forward
from megatron_ponder.kernels.attention import DEAD, FOLDED_CHANNELS, attend, key_channels
from megatron_ponder.parallel.mesh import Axis

BLOCK = 32


class BlockCache:
    """The cache of one rank's layers and heads.

    Attributes:
        layers: one view a layer, with the `attend` that attention calls.
    """

    def __init__(self, config: ModelConfig, num_layers: int, axis: Axis, rows: int, like: Tensor) -> None:
        """Make an empty cache.

        Args:
            config: of the model.
            num_layers: of this rank.
            axis: the tensor ranks, which share the heads.
            rows: sequences that may be live.
            like: device and type of the keys.
        """
        heads, head_size = config.num_kv_heads // axis.size, config.head_size
        dead = key_channels(torch.full((1, 1), DEAD, device=like.device), head_size, like.dtype)
        self._empty_key = torch.cat([like.new_zeros(head_size), dead.view(FOLDED_CHANNELS)])
        self.keys = like.new_empty(num_layers, 0, heads, BLOCK, head_size + FOLDED_CHANNELS)
        self.values = like.new_empty(num_layers, 0, heads, BLOCK, head_size)
        self._tables: list[list[int]] = [[] for _ in range(rows)]
        self._written = [0] * rows
        self._owners = np.empty(0, np.int64)
        self._used = 0
        self._prefixes: dict[int, tuple[Tensor, Tensor]] = {}
        self.layers = [_Layer(self, layer) for layer in range(num_layers)]

    @property
    def capacity(self) -> int:
        """Slots for which there is memory."""
        return len(self._owners) * BLOCK

    @property
    def reserved(self) -> int:
        """Slots of the blocks that sequences hold."""
        return self._used * BLOCK

    def prepare(self, forward: Forward) -> None:
        """Store, free and load what a forward says, make room for its slots, and note where they go."""
        for key, row, slots in forward.stored:
            self._prefixes[key] = tuple(self._read(pool, row, slots) for pool in (self.keys, self.values))
        for key in forward.dropped:
            del self._prefixes[key]
        for row in forward.cleared:
            self._clear(row)
        for key, row, slots in forward.loaded:
            self._extend(row, slots)
            for pool, stored in zip((self.keys, self.values), self._prefixes[key], strict=True):
                self._write(pool, row, stored[:, :, :slots])
        if not forward:
            return
        segments, decoding = forward.segments, len(forward.steps)
        for row, start, count in segments:
            self._extend(row, start + count)
        device = self.keys.device
        blocks, places = [], []
        for row, start, count in segments:
            table = self._tables[row]
            for slot in range(start, start + count):
                blocks.append(table[slot // BLOCK])
                places.append(slot % BLOCK)
        self.blocks_T, self.places_T = torch.tensor([blocks, places], device=device)
        self.decoding = decoding
        if decoding:
            queries = np.full(len(self._tables), -1)
            queries[[segment.row for segment in segments[:decoding]]] = np.arange(decoding)
            owners = queries[self._owners[: self._used]]
            present = owners >= 0
            # All blocks, as a view, where every live sequence decodes; a selection copies.
            self.read = slice(self._used) if present.all() else torch.from_numpy(present.nonzero()[0]).to(device)
            self.owners = torch.from_numpy(owners[present]).to(device)
        self.prompts = []
        at = decoding
        for row, start, count in segments[decoding:]:
            table = torch.tensor(self._tables[row], device=device)
            self.prompts.append((slice(at, at + count), table, start + count))
            at += count

    def _extend(self, row: int, length: int) -> None:
        table = self._tables[row]
        missing = -(-length // BLOCK) - len(table)
        if missing > 0:
            if self._used + missing > len(self._owners):
                self._resize(2 * (self._used + missing))
            new = slice(self._used, self._used + missing)
            self.keys[:, new] = self._empty_key
            self.values[:, new] = 0
            self._owners[new] = row
            table.extend(range(new.start, new.stop))
            self._used = new.stop
        # An iterate of a prompt may be shorter than the one before; what that left behind must not be seen.
        for slot in range(length, self._written[row]):
            self.keys[:, table[slot // BLOCK], :, slot % BLOCK] = self._empty_key
        self._written[row] = length

    def _read(self, pool: Tensor, row: int, slots: int) -> Tensor:
        """A copy of the first slots of a row, (layers, M, slots, ..)."""
        table = torch.tensor(self._tables[row], device=pool.device)
        return pool[:, table].transpose(1, 2).flatten(2, 3)[:, :, :slots].contiguous()

    def _write(self, pool: Tensor, row: int, content: Tensor) -> None:
        """Fill the first slots of a row."""
        for block, part in zip(self._tables[row], content.split(BLOCK, 2), strict=True):
            pool[:, block, :, : part.shape[2]] = part

    def _clear(self, row: int) -> None:
        freed = sorted(self._tables[row], reverse=True)
        self._tables[row], self._written[row] = [], 0
        for block in freed:
            self._used -= 1
            last = self._used
            if block != last:
                self.keys[:, block] = self.keys[:, last]
                self.values[:, block] = self.values[:, last]
                owner = self._owners[block] = self._owners[last]
                table = self._tables[owner]
                table[table.index(last)] = block
        if 4 * self._used < len(self._owners):
            self._resize(2 * self._used)

    def _resize(self, blocks: int) -> None:
        used = slice(self._used)
        for name in ("keys", "values"):
            old = getattr(self, name)
            new = old.new_empty(len(old), blocks, *old.shape[2:])
            new[:, used] = old[:, used]
            setattr(self, name, new)
        owners = np.empty(blocks, np.int64)
        owners[used] = self._owners[used]
        self._owners = owners


class _Layer:
    """One layer of the cache: `LayerCache` for the forward that was prepared."""

    def __init__(self, cache: BlockCache, layer: int) -> None:
        self._cache, self._layer = cache, layer

    def attend(self, q_BTNE: Tensor, k_BTME: Tensor, v_BTMD: Tensor, scale: float) -> Tensor:
        cache = self._cache
        keys, values = cache.keys[self._layer], cache.values[self._layer]
        keys[cache.blocks_T, :, cache.places_T] = k_BTME[0]
        values[cache.blocks_T, :, cache.places_T] = v_BTMD[0]
        q_TNE = q_BTNE[0]
        parts = []
        if cache.decoding:
            q = q_TNE[: cache.decoding] * scale
            parts.append(_attend_blocks(q, keys[cache.read], values[cache.read], cache.owners))
        for at, table, length in cache.prompts:
            k, v = (x[table].transpose(1, 2).flatten(0, 1)[:length].unsqueeze(0) for x in (keys, values))
            y = attend(q_TNE[at].unsqueeze(0), k, F.pad(v, (0, FOLDED_CHANNELS)), scale)
            parts.append(y[0, ..., : v.shape[-1]])
        return (parts[0] if len(parts) == 1 else torch.cat(parts)).unsqueeze(0)


def _attend_blocks(q_RNE: Tensor, keys_nMBE: Tensor, values_nMBD: Tensor, owners_n: Tensor) -> Tensor:
    """Attention of one query a sequence over the blocks that the sequence owns, (R, N, D).

    Every block gives the sum of its exponentials and of its weighted values; a sequence adds up those of its blocks.

    Args:
        q_RNE: scaled queries.
        keys_nMBE, values_nMBD: of n blocks.
        owners_n: int64, which query each block belongs to.
    """
    heads = keys_nMBE.shape[1]
    q_RMGE = q_RNE.unflatten(1, (heads, -1))
    if len(q_RMGE) == 1:  # all blocks are of one sequence: sums over blocks, in half as many operations
        logits = _wide_product(q_RMGE, keys_nMBE.transpose(2, 3))
        p = logits.sub_(logits.amax((0, 3), keepdim=True)).exp_()
        y = _wide_product(p.to(values_nMBD.dtype), values_nMBD).sum(0, keepdim=True)
        return (y / p.sum((0, 3)).view(1, heads, -1, 1)).to(q_RNE.dtype).flatten(1, 2)
    logits = _wide_product(q_RMGE[owners_n], keys_nMBE.transpose(2, 3))
    block_top = logits.amax(-1)
    top = block_top.new_full(q_RMGE.shape[:3], -torch.inf)
    top.scatter_reduce_(0, owners_n.view(-1, 1, 1).expand_as(block_top), block_top, "amax")
    p = logits.sub_(top[owners_n].unsqueeze(-1)).exp_()
    total = torch.zeros_like(top).index_add_(0, owners_n, p.sum(-1))
    y = torch.zeros(*top.shape, values_nMBD.shape[-1], dtype=p.dtype, device=p.device)
    y.index_add_(0, owners_n, _wide_product(p.to(values_nMBD.dtype), values_nMBD))
    return (y / total.unsqueeze(-1)).to(q_RNE.dtype).flatten(1, 2)


def _wide_product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in fp32 or better: logits in bf16 would lose what the folded channels carry."""
    wide = torch.promote_types(a.dtype, torch.float32)
    return a.to(wide) @ b.to(wide)
