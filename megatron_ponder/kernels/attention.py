"""Attention in which a key may carry a weight: the one entry, the kernels behind it, and which of them a call takes.

log w is added to a key's logit for every query. Such a bias depends on the key alone, so that one more channel makes it
exact with any causal kernel: q' = [q, c] and k' = [k, log w · √d / c] give q'·k'/√d = q·k/√d + log w. No T × T mask
exists, in training or in the key-value cache, and the gradient of log w comes from the kernel's gradient of k'.

Who sees whom beyond that is a matter of segments, which lie one behind the other in the rows of a batch.

Another kernel is a function like `_sdpa` in a file of its own and a row of `_KERNELS`.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_ponder.kernels.rotary import Rotation, rotate
from megatron_ponder.kernels.segmented_attention import segmented_attention
from megatron_ponder.kernels.segments import Segments

# Kernels want head sizes in multiples of 8, so folding costs eight channels of which it uses one or two.
FOLDED_CHANNELS = 8
# A key of this log weight gets probability exactly 0 in every floating-point type, and stays finite in bf16.
DEAD = -1e4


class Call(NamedTuple):
    """What decides which kernel computes a call.

    Attributes:
        device: type of device, as in `torch.device.type`.
        dtype: of queries, keys and values.
        grouped: fewer heads of keys and values than of queries.
        segmented: rows are of several segments.
    """

    device: str
    dtype: torch.dtype
    grouped: bool = False
    segmented: bool = False


class Kernel(NamedTuple):
    """A way to compute attention, and what estimates ask about it.

    For the backward pass it keeps queries, keys, values, its output, and an fp32 number a query and head.

    Attributes:
        compute: (q, k, v, scale, log_w, segments) → (B, T, N, D), as `attend`.
        suits: whether it computes a call.
        block: keys that a query reads at a time; of the last it pays for all.
        folds: it is given log w in further channels of queries and keys, and no other.
    """

    compute: Callable[[Tensor, Tensor, Tensor, float, Tensor | None, Segments | None], Tensor]
    suits: Callable[[Call], bool]
    block: int = 1
    folds: bool = False

    def pairs(self, length: int) -> float:
        """Pairs of a query and a key that causal attention over so many slots computes."""
        return length * (length + min(self.block, length)) / 2


def attend(
    q_BTND: Tensor,
    k_BSMD: Tensor,
    v_BSMD: Tensor,
    scale: float,
    log_w_BS: Tensor | None = None,
    segments: Segments | None = None,
    angles: Rotation | None = None,
) -> Tensor:
    """Causal attention; every call of it goes through here and is given the kernel that suits it.

    Args:
        q_BTND: queries of N heads, of the last T slots.
        k_BSMD, v_BSMD: keys and values of all S slots, of M heads; M divides N.
        scale: factor on the logits.
        log_w_BS: log weight of each key, in fp32 or better; None where every weight is 1.
        segments: of the B · T slots, with T = S; None if every row is one.
        angles: by which queries and keys are rotated first, with T = S; None if they are already.

    Returns:
        (B, T, N, D).
    """
    head_size, grouped = v_BSMD.shape[-1], q_BTND.shape[2] != k_BSMD.shape[2]
    kernel = choose(Call(q_BTND.device.type, q_BTND.dtype, grouped, segments is not None))
    if log_w_BS is None or not kernel.folds:
        q_BTND, k_BSMD = (_turned(x, angles, None) for x in (q_BTND, k_BSMD))
        return kernel.compute(q_BTND, k_BSMD, v_BSMD, scale, log_w_BS, segments)
    of_q, of_k = folded_channels(log_w_BS, head_size, k_BSMD)
    q_BTNE, k_BSME = _turned(q_BTND, angles, of_q), _turned(k_BSMD, angles, of_k)
    return kernel.compute(q_BTNE, k_BSME, F.pad(v_BSMD, (0, FOLDED_CHANNELS)), scale, None, segments)[..., :head_size]


def choose(call: Call) -> Kernel:
    """The kernel that computes a call: the first that suits."""
    return next(kernel for kernel in _KERNELS if kernel.suits(call))


def _turned(x: Tensor, angles: Rotation | None, channels: Tensor | None) -> Tensor:
    """Rotated, with further channels behind those of every head."""
    if angles is not None:
        return rotate(x, angles, channels)
    if channels is None:
        return x
    return torch.cat([x, channels.unsqueeze(2).expand(*x.shape[:3], -1)], -1)


def _sdpa(
    q_BTND: Tensor, k_BSMD: Tensor, v_BSMD: Tensor, scale: float, _: Tensor | None, segments: Segments | None
) -> Tensor:
    """PyTorch's own kernels."""
    if segments is not None:
        flat = (x.flatten(0, 1) for x in (q_BTND, k_BSMD, v_BSMD))
        return segmented_attention(*flat, scale, segments).unflatten(0, q_BTND.shape[:2])
    last, every = q_BTND.shape[1], k_BSMD.shape[1]
    mask = None
    if last < every:
        places = torch.arange(every, device=q_BTND.device)
        mask = places <= places[-last:, None]
    out = F.scaled_dot_product_attention(
        q_BTND.transpose(1, 2),
        k_BSMD.transpose(1, 2),
        v_BSMD.transpose(1, 2),
        attn_mask=mask,
        is_causal=mask is None,
        scale=scale,
        enable_gqa=q_BTND.shape[2] != k_BSMD.shape[2],
    )
    return out.transpose(1, 2)


_KERNELS = (
    Kernel(_sdpa, lambda call: call.device == "cpu", block=512, folds=True),
    Kernel(_sdpa, lambda call: not call.segmented, folds=True),
)


def query_channels(q: Tensor, head_size: int) -> Tensor:
    """The constant channels of folded queries, (1, 1, FOLDED_CHANNELS), in the type of q.

    The constant is the power of two nearest √d, which every floating-point type holds exactly.
    """
    channels = q.new_zeros(1, 1, FOLDED_CHANNELS)
    channels[..., :2] = _constant(head_size)
    return channels


def key_channels(log_w_BT: Tensor, head_size: int, dtype: torch.dtype) -> Tensor:
    """The channels that carry log w in folded keys, (B, T, FOLDED_CHANNELS): its value, and what rounding it lost.

    In bf16 the first alone would keep 8 bits of log w; in fp32 and fp64 the second is zero.
    """
    scaled = log_w_BT * (math.sqrt(head_size) / _constant(head_size))
    high = scaled.to(dtype)
    low = (scaled - high.to(scaled.dtype)).to(dtype)
    return F.pad(torch.stack([high, low], -1), (0, FOLDED_CHANNELS - 2))


def folded_channels(log_w_BT: Tensor, head_size: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """The channels of queries and of keys, in the type of `like`."""
    return query_channels(like, head_size), key_channels(log_w_BT, head_size, like.dtype)


def _constant(head_size: int) -> float:
    return 2.0 ** round(math.log2(math.sqrt(head_size)))
