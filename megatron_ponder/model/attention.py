"""Causal self-attention in which a key may carry a weight: log w is added to its logit for every query.

The bias depends on the key alone, so one more channel makes it exact with any causal kernel:
q' = [q, c] and k' = [k, log w · √d / c] give q'·k'/√d = q·k/√d + log w. No T × T mask exists, in training or in the
key-value cache, and the gradient of log w comes from the kernel's gradient of k'.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_ponder.config import ModelConfig
from megatron_ponder.model.cpu_attention import causal_attention
from megatron_ponder.model.rope import Rotation, rotate
from megatron_ponder.parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron_ponder.parallel.mesh import Axis
from megatron_ponder.parallel.regions import enter
from megatron_ponder.parallel.sharding import ShardedModule, normal

# Kernels want head sizes in multiples of 8, so folding costs eight channels of which it uses one or two.
FOLDED_CHANNELS = 8
# A key of this log weight gets probability exactly 0 in every floating-point type, and stays finite in bf16.
DEAD = -1e4


class LayerCache(Protocol):
    """Where one layer keeps the keys and values of executed slots."""

    def attend(self, q_BTNE: Tensor, k_BTME: Tensor, v_BTMD: Tensor, scale: float) -> Tensor:
        """Store the slots being run and attend from each to those of its sequence up to itself.

        Args:
            q_BTNE, k_BTME: queries and keys, with the folded channels.
            v_BTMD: values, without.
            scale: factor on the logits.

        Returns:
            (B, T, N, D).
        """


class Slots(NamedTuple):
    """The slots of one forward, as every block sees them: S of each of L tokens, T = L · S in all.

    Attributes:
        tokens: L.
        angles: of the T slots.
        log_w_BT: log weight of each slot as a key, on all tensor ranks; None where every weight is 1.
        mask: bool (B, 1, T, T) in place of the causal one.
        kept: the slots of every token whose result is wanted.
        channels: folded channels of queries and keys, where they are computed once for all layers.
    """

    tokens: int
    angles: Rotation
    log_w_BT: Tensor | None = None
    mask: Tensor | None = None
    kept: slice = slice(None)
    channels: tuple[Tensor, Tensor] | None = None

    def keep(self, x: Tensor, tokens: int) -> Tensor:
        """(B, S slots of `tokens` tokens, ..) → (B, their kept slots, ..)."""
        return x if self.kept == slice(None) else x.unflatten(1, (tokens, -1))[:, :, self.kept].flatten(1, 2)


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


def attend(q_BTND: Tensor, k_BSMD: Tensor, v_BSMD: Tensor, scale: float, mask: Tensor | None, causal: bool) -> Tensor:
    """Scaled dot-product attention; every call of attention goes through here and is given the kernel that suits it.

    Args:
        q_BTND: queries of N heads.
        k_BSMD, v_BSMD: keys and values of M heads; M divides N.
        scale: factor on the logits.
        mask: bool (B, 1, T, S), true where a query may look; None for no mask but the causal one.
        causal: mask the future; only with mask None and T = S.

    Returns:
        (B, T, N, D).
    """
    grouped = q_BTND.shape[2] != k_BSMD.shape[2]
    plain = causal and mask is None and not grouped
    if plain and q_BTND.device.type == "cpu" and q_BTND.dtype != torch.bfloat16 and torch.is_grad_enabled():
        return causal_attention(q_BTND, k_BSMD, v_BSMD, scale)
    out = F.scaled_dot_product_attention(
        q_BTND.transpose(1, 2),
        k_BSMD.transpose(1, 2),
        v_BSMD.transpose(1, 2),
        attn_mask=mask,
        is_causal=causal and mask is None,
        scale=scale,
        enable_gqa=grouped,
    )
    return out.transpose(1, 2)


class Attention(ShardedModule):
    """Multi-head attention with rotary positions, optional grouped-query heads and optional key weights."""

    def __init__(self, config: ModelConfig, axis: Axis) -> None:
        super().__init__(axis)
        self.head_size = config.head_size
        self.rotated = int(config.head_size * config.rotary_fraction)
        bias = config.family == "gpt_neox"
        initial, last = normal(config.init_std), normal(config.init_std / math.sqrt(2 * config.num_layers))
        kv_size = config.num_kv_heads * config.head_size
        self.q_proj = ColumnParallelLinear(config.hidden_size, config.hidden_size, axis, initial, bias)
        self.k_proj = ColumnParallelLinear(config.hidden_size, kv_size, axis, initial, bias)
        self.v_proj = ColumnParallelLinear(config.hidden_size, kv_size, axis, initial, bias)
        self.o_proj = RowParallelLinear(config.hidden_size, config.hidden_size, axis, last, bias)

    def project(self, x_BTH: Tensor) -> Sequence[Tensor]:
        """This rank's queries, keys and values, (B, T, heads · head size) each."""
        return self.q_proj(x_BTH), self.k_proj(x_BTH), self.v_proj(x_BTH)

    def forward(self, x_BTH: Tensor, slots: Slots, cache: LayerCache | None = None) -> Tensor:
        """Attend from every slot to itself and the slots before it.

        Args:
            x_BTH: normed inputs in the residual stream.
            slots: what they are.
            cache: keys and values of earlier slots; then log w is needed.

        Returns:
            (B, kept slots, H) in the residual stream.
        """
        x_BTH = enter(x_BTH, self.axis, slots.tokens)
        q, k, v = (y.unflatten(-1, (-1, self.head_size)) for y in self.project(x_BTH))
        if slots.log_w_BT is None:
            q, k = rotate(q, slots.angles), rotate(k, slots.angles)
        else:
            of_q, of_k = slots.channels or folded_channels(slots.log_w_BT, self.head_size, k)
            q, k = rotate(q, slots.angles, of_q), rotate(k, slots.angles, of_k)
        if cache is not None:
            y = cache.attend(q, k, v, self.head_size**-0.5)
        else:
            v = v if slots.log_w_BT is None else F.pad(v, (0, FOLDED_CHANNELS))
            y = attend(q, k, v, self.head_size**-0.5, slots.mask, causal=True)
        y = slots.keep(y[..., : self.head_size].flatten(2), slots.tokens)
        return self.o_proj(y, slots.tokens)
