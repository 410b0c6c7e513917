"""Keys and values of executed slots, for sequences that are at different lengths."""

import torch
from torch import Tensor

from megatron_ponder.config import ModelConfig
from megatron_ponder.model.attention import DEAD, FOLDED_CHANNELS, key_channels


class SlotCache:
    """The cache of a batch: every layer's keys and values, and how many slots each sequence has stored.

    Sequences need not have the same length: places that a sequence has not filled hold a key of weight 0, which the
    folded channel makes exact, so that no mask is needed. Capacity doubles when it is used up.

    Attributes:
        lengths: int64 (B,), slots stored for each sequence.
        layers: one view a layer, with the `append` that attention calls.
    """

    def __init__(self, config: ModelConfig, batch_size: int, capacity: int, like: Tensor) -> None:
        """Allocate on the device and in the type of `like`, for `capacity` slots a sequence at first."""
        head_size, device = config.head_size, like.device
        dead = key_channels(torch.full((1, 1), DEAD, device=device), head_size, like.dtype)
        self._empty_key = torch.cat([like.new_zeros(head_size), dead.view(FOLDED_CHANNELS)])
        self.lengths = torch.zeros(batch_size, dtype=torch.long, device=device)
        self._longest = 0
        shape = (batch_size, 0, config.num_kv_heads, head_size + FOLDED_CHANNELS)
        self.layers = [_Layer(self, like.new_empty(shape)) for _ in range(config.num_layers)]
        self._reserve(capacity)

    def advance(self) -> None:
        """Count the slot that every sequence has just stored in every layer."""
        self.lengths += 1
        self._longest += 1

    def select(self, rows: Tensor) -> None:
        """Keep the sequences of these rows, int64 (b,), in this order."""
        self.lengths = self.lengths[rows]
        self._longest = int(self.lengths.max()) if len(rows) else 0
        for layer in self.layers:
            layer.keys, layer.values = layer.keys[rows], layer.values[rows]

    def clear(self, row: int) -> None:
        """Forget all slots of one sequence."""
        self.lengths[row] = 0
        for layer in self.layers:
            layer.keys[row] = self._empty_key

    def visible(self) -> int:
        """Places that attention has to look at: the longest sequence with the slot being run."""
        if self._longest + 1 > self.layers[0].keys.shape[1]:
            self._reserve(2 * (self._longest + 1))
        return self._longest + 1

    def _reserve(self, capacity: int) -> None:
        for layer in self.layers:
            batch, have, heads, width = layer.keys.shape
            fresh = self._empty_key.expand(batch, capacity - have, heads, width)
            layer.keys = torch.cat([layer.keys, fresh], 1)
            layer.values = torch.cat([layer.values, torch.zeros_like(fresh)], 1)


class _Layer:
    """One layer's keys and values, (B, capacity, heads, head size + FOLDED_CHANNELS)."""

    def __init__(self, cache: SlotCache, empty: Tensor) -> None:
        self._cache = cache
        self.keys, self.values = empty, empty

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        visible = self._cache.visible()
        rows = torch.arange(len(keys), device=keys.device)
        self.keys[rows, self._cache.lengths] = keys.squeeze(1)
        self.values[rows, self._cache.lengths] = values.squeeze(1)
        return self.keys[:, :visible], self.values[:, :visible]
