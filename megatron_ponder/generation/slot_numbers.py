"""What the host says of the slots of a forward, and how it gets to the device: in one copy, for which nobody waits."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from megatron_ponder.generation.block_pool import BLOCK, BlockPool
from megatron_ponder.generation.forward import Forward


class SlotNumbers(NamedTuple):
    """int64 numbers of each of T slots, as arrays on the host or tensors on the device.

    Attributes:
        tokens: ids; 0 for latent slots.
        steps: which of its token's slots it is, from 0.
        sources: indices into the forward before; read where the slot is latent.
        positions: of the tokens.
        log_w: bits of the fp64 log weights as keys.
        rows: of the cache.
        blocks: of the pool, where keys and values go.
        places: in these.
        lengths: slots of the sequence up to this one; of no meaning in a window.
    """

    tokens: np.ndarray | Tensor
    steps: np.ndarray | Tensor
    sources: np.ndarray | Tensor
    positions: np.ndarray | Tensor
    log_w: np.ndarray | Tensor
    rows: np.ndarray | Tensor
    blocks: np.ndarray | Tensor
    places: np.ndarray | Tensor
    lengths: np.ndarray | Tensor

    @classmethod
    def of(cls, forward: Forward, pool: BlockPool) -> "SlotNumbers":
        """The numbers of a forward with at least one slot, for which the pool has blocks."""
        tokens = np.array(forward.tokens)
        segment_rows, starts, counts = np.array(forward.segments).T
        rows, slots = segment_rows, starts
        if forward.prompts:
            rows = np.repeat(segment_rows, counts)
            slots = np.repeat(starts - counts.cumsum() + counts, counts) + np.arange(len(tokens))
        for prompt in forward.prompts:
            if prompt.window is not None:
                slots[prompt.at : prompt.at + prompt.count] = prompt.window.places
        return cls(
            np.maximum(tokens, 0),
            np.maximum(-tokens, 0),
            np.array(forward.sources),
            np.array(forward.positions),
            np.array(forward.log_w, np.float64).view(np.int64),
            rows,
            pool.tables[rows, slots // BLOCK],
            slots % BLOCK,
            slots + 1,
        )

    def padded(self, size: int, slot: "SlotNumbers") -> "SlotNumbers":
        """On the host, the numbers of so many slots, those that are missing like the given one."""
        missing = size - len(self.tokens)
        return SlotNumbers(*[np.append(own, np.full(missing, other)) for own, other in zip(self, slot, strict=True)])

    def log_weights(self, dtype: torch.dtype) -> Tensor:
        """On the device, the log weights as numbers."""
        return self.log_w.view(torch.float64).to(dtype)


def bucket(slots: int) -> int:
    """The next of few sizes: multiples of 8, and from 128 on of an eighth of the power of two below."""
    step = max(8, 1 << slots.bit_length() - 4) if slots >= 8 else 8
    return -(-slots // step) * step


def upload(arrays: Sequence[np.ndarray], device: torch.device) -> list[Tensor]:
    """int64 arrays on a device.

    Args:
        arrays: on the host.
        device: where to; the host does not wait until they are there.
    """
    whole = torch.from_numpy(np.concatenate([array.reshape(-1) for array in arrays]))
    if device.type == "cuda":
        whole = whole.pin_memory().to(device, non_blocking=True)
    parts = whole.split([array.size for array in arrays])
    return [part.view(array.shape) for part, array in zip(parts, arrays, strict=True)]
