"""What the element-wise operations of a block move through memory, for each slot that it runs.

Without a compiler every operation reads what it needs and writes what it makes. The equations count these one by one;
`tests/estimates/test_element_wise.py` compares them with the operations that a block runs. A compiler fuses neighbours,
which then read what comes into them and write what leaves them; nothing has counted those. Symbols: H hidden size, b
bytes of an activation.
"""

from typing import NamedTuple

from megatron_ponder.estimates.part import BlockSizes
from megatron_ponder.estimates.rank import FP32


class Moved(NamedTuple):
    """Numbers of b bytes that are read and written for a slot, in the two directions."""

    forward: float
    backward: float


def of_attention(block: BlockSizes, channels: int, copied: bool, width: int, fused: bool, share: float = 1.0) -> Moved:
    """Norm, rotation and, if there are any, norms of queries and keys; going back, sums of gradients as well.

    A rotated channel takes two products and a sum, of b bytes each where the angles are as wide; else in fp32, from
    which the result is copied.

    Args:
        block: its sizes.
        channels: of a head of queries and keys as the kernel takes it, those of log w included.
        copied: values are made wider for the kernel, and what it puts out narrower.
        width: b.
        fused: by a compiler.
        share: of the residual stream that is on this rank.
    """
    hidden, normed, biased = share * block.hidden, block.normed, block.biased_before
    turned = (block.query_heads + block.key_heads) * channels
    copies = 2 * (block.query + block.key) * copied
    if fused:
        # the norm (2 H); back, the norm with the sums before it (6 H)
        turn = 2 * turned + copies
        return Moved(2 * hidden + turn + 2 * normed, 6 * hidden + turn + 3 * normed + biased)
    of_channel = 5 if width == FP32 else (2 * (width + FP32) + 3 * FP32 + FP32 + width) / width
    turn = of_channel * block.rotated + 2 * (turned - block.rotated) + copies
    # back: the norm (3 H) and its output once more (2 H), sums with two more products and with the stream (9 H)
    return Moved(2 * hidden + turn + 2 * normed, 14 * hidden + turn + 3 * normed + biased)


def of_feed_forward(block: BlockSizes, fused: bool, share: float = 1.0) -> Moved:
    """Norm, two additions to the stream, the activation function and its product with the other half, if there is one.

    Args:
        block: its sizes.
        fused: by a compiler.
        share: of the residual stream that is on this rank.
    """
    hidden, activated, gated = share * block.hidden, block.activated, block.expanded > block.activated
    if fused:
        # additions with the norm after them (7 H), back with the sums before it (6 H)
        inside = Moved(3, 5) if gated else Moved(2, 3)
        outside = Moved(7, 6)
    else:
        # back: the function (with its product) once more, and its gradients; the norm (5 H), and the sums of gradients
        inside = Moved(5, 5 + 11) if gated else Moved(2, 2 + 3)
        outside = Moved(8, 11 if gated else 8)
    forward, backward = (h * hidden + f * activated for h, f in zip(outside, inside, strict=True))
    return Moved(forward, backward + block.biased_after)
