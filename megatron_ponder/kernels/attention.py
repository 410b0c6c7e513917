"""Attention in which a key may carry a weight: the one entry, the kernels behind it, and which of them a call takes.

log w is added to a key's logit for every query. Such a bias depends on the key alone, so that one more channel makes it
exact with any causal kernel: q' = [q, c] and k' = [k, log w · √d / c] give q'·k'/√d = q·k/√d + log w. No T × T mask
exists, in training or in the key-value cache, and the gradient of log w comes from the kernel's gradient of k'.

Who sees whom beyond that is a matter of segments, which lie one behind the other in the rows of a batch.

Other forms, which are as exact, stand beside this one, because which is fastest on a GPU has to be measured: w on the
side of the values, and a kernel that adds log w itself. Another kernel is a function like `_sdpa` in a file of its own
and a row of `_KERNELS`.
"""

import math
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import varlen

from megatron_ponder.base.errors import UserError
from megatron_ponder.config.run import AttentionKernel
from megatron_ponder.kernels.own_attention import latent_attention, own_attention
from megatron_ponder.kernels.rotary import Rotation, rotate
from megatron_ponder.kernels.segmented_attention import segmented_attention
from megatron_ponder.kernels.segments import Segments
from megatron_ponder.kernels.triton_attention import padded, weighted_attention

# Kernels want head sizes in multiples of 8, so folding costs eight channels of which it uses one or two.
FOLDED_CHANNELS = 8
# A key of this log weight gets probability exactly 0 in every floating-point type, and stays finite in bf16.
DEAD = -1e4

# Up to so many slots of a row without weights, a mask costs a CPU less than attention of further slots by themselves.
_SHORT = 256


class OwnSlots(NamedTuple):
    """Slots of which a token's first is seen by all that follow, and its others by the token alone.

    Attributes:
        count: S, slots a token.
        places: int64 (T,), where they stand among S of each token, if tokens have unlike numbers; None if all have S.
        rows: of as many tokens each, in which those places lie one behind the other.
        tokens: of all rows.
    """

    count: int
    places: Tensor | None = None
    rows: int = 1
    tokens: int = 0


class Call(NamedTuple):
    """What decides which kernel computes a call.

    Attributes:
        device: type of device, as in `torch.device.type`.
        dtype: of queries, keys and values.
        grouped: fewer heads of keys and values than of queries.
        segmented: rows are of several segments.
        head_size: channels of a head.
        own: all but the first slots of tokens are seen by their own alone.
    """

    device: str
    dtype: torch.dtype
    grouped: bool = False
    segmented: bool = False
    head_size: int = 64
    own: bool = False


class Kernel(NamedTuple):
    """A way to compute attention, and what estimates ask about it.

    For the backward pass it keeps queries, keys and values as it is given them, its output, and an fp32 number a query
    and head.

    Attributes:
        name: as in `training.attention_kernel`; several rows may share one.
        compute: (q, k, v, scale, log_w, segments) → (B, T, N, D), as `attend`; of own slots with S behind these.
        lacks: what a call would need for it, in words; None if it computes the call.
        carried: where log w travels: in further channels of queries, keys and values (`channels`), which it is given in
            place of log w; in those of values alone (`values`); by itself (`apart`).
        block: keys that a query reads at a time; of the last it pays for all.
        width: channels that it computes for a head of so many.
        backward: work of its backward pass, of that of its forward pass.
    """

    name: str
    compute: Callable[..., Tensor]
    lacks: Callable[[Call], str | None]
    carried: Literal["channels", "values", "apart"] = "channels"
    block: int = 1
    width: Callable[[int], int] = int
    # Probabilities are computed anew, and then there are four products, after two forward.
    backward: float = 2.5

    def pairs(self, length: int) -> float:
        """Pairs of a query and a key that causal attention over so many slots computes."""
        return length * (length + min(self.block, length)) / 2

    def channels(self, head_size: int, weighted: bool) -> tuple[int, int]:
        """Channels of a head of queries and keys, and of one of values and outputs, in the kernel."""
        further = FOLDED_CHANNELS if weighted else 0
        of_queries, of_values = self.carried == "channels", self.carried != "apart"
        return head_size + of_queries * further, head_size + of_values * further

    def operations(self, head_size: int, weighted: bool) -> int:
        """Operations forward of a head for each pair of a query and a key."""
        return 2 * sum(map(self.width, self.channels(head_size, weighted)))


def attend(
    q_BTND: Tensor,
    k_BTMD: Tensor,
    v_BTMD: Tensor,
    scale: float,
    log_w_BT: Tensor | None = None,
    segments: Segments | None = None,
    angles: Rotation | None = None,
    kernel: AttentionKernel = "auto",
    own: OwnSlots | None = None,
) -> Tensor:
    """Causal attention; every call of it goes through here and is given the kernel that suits it.

    Args:
        q_BTND: queries of N heads.
        k_BTMD, v_BTMD: keys and values of M heads; M divides N.
        scale: factor on the logits; 1/√D where keys have weights.
        log_w_BT: log weight of each key, in fp32 or better; None where every weight is 1.
        segments: of the B · T slots, or of their tokens where `own` is given; None if every row is one.
        angles: by which queries and keys are rotated first; None if they are already.
        kernel: the one to take.
        own: which slots are seen by their own token alone; None for none.

    Returns:
        (B, T, N, D).

    Raises:
        UserError: if that cannot compute the call.
    """
    head_size, grouped = v_BTMD.shape[-1], q_BTND.shape[2] != k_BTMD.shape[2]
    call = Call(q_BTND.device.type, q_BTND.dtype, grouped, segments is not None, head_size, own is not None)
    chosen = choose(call, kernel)
    if own is not None:
        q_BTND, k_BTMD = (_turned(x, angles, None) for x in (q_BTND, k_BTMD))
        return _attend_own(chosen, q_BTND, k_BTMD, v_BTMD, scale, log_w_BT, segments, own)
    if log_w_BT is None or chosen.carried != "channels":
        q_BTND, k_BTMD = (_turned(x, angles, None) for x in (q_BTND, k_BTMD))
        return chosen.compute(q_BTND, k_BTMD, v_BTMD, scale, log_w_BT, segments)
    assert scale == head_size**-0.5  # for which channels are folded
    of_q, of_k = folded_channels(log_w_BT, head_size, k_BTMD)
    q_BTNE, k_BTME = _turned(q_BTND, angles, of_q), _turned(k_BTMD, angles, of_k)
    return chosen.compute(q_BTNE, k_BTME, F.pad(v_BTMD, (0, FOLDED_CHANNELS)), scale, None, segments)[..., :head_size]


def attend_latent(
    q_BLND: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    scale: float,
    log_w_BLJ: Tensor | None = None,
    segments: Segments | None = None,
    kernel: AttentionKernel = "auto",
) -> Tensor:
    """Attention of the slots of one latent step j, which their own token alone sees, where the others have been run.

    Args:
        q_BLND: queries of N heads, rotated.
        keys, values: (B, L, M, D) each, of first slots and of the latent steps 1 .. j, rotated; M divides N.
        scale: factor on the logits.
        log_w_BLJ: log weights of the j latent steps as keys, in fp32 or better; None where every weight is 1.
        segments: of the B · L tokens; None if every row is one.
        kernel: the one to take.

    Returns:
        (B, L, N, D).

    Raises:
        UserError: if that cannot compute the call.
    """
    head_size, grouped = q_BLND.shape[-1], q_BLND.shape[2] != keys[0].shape[2]
    choose(Call(q_BLND.device.type, q_BLND.dtype, grouped, segments is not None, head_size, own=True), kernel)
    return latent_attention(q_BLND, keys, values, scale, log_w_BLJ, segments)


def choose(call: Call, name: AttentionKernel = "auto") -> Kernel:
    """The kernel that computes a call: the first that can, of those of a name.

    Raises:
        UserError: if none of this name can.
    """
    named = [kernel for kernel in (_OWN_KERNELS if call.own else _KERNELS) if name in ("auto", kernel.name)]
    for kernel in named:
        if kernel.lacks(call) is None:
            return kernel
    if not named:
        raise UserError(
            f"training.attention_kernel {name} has every slot see all before it, and not latent slots their own token "
            "alone; set training.attention_kernel to auto",
            shared=True,
        )
    if name != "auto":
        advice = "set training.attention_kernel to auto"
        raise UserError(f"training.attention_kernel {name} needs {named[-1].lacks(call)}; {advice}", shared=True)
    here = [kernel for kernel in named if kernel.lacks(call) not in ("a CPU", "a GPU")]
    lacking = ", ".join(f"{kernel.name} needs {kernel.lacks(call)}" for kernel in here)
    slots = (
        " of latent slots that their own token alone sees (ponder.mode sps, ponder.latent_visibility own)" * call.own
    )
    raise UserError(f"no kernel computes this attention{slots}: {lacking}; change one of these", shared=True)


def _attend_own(
    kernel: Kernel,
    q_BTND: Tensor,
    k_BTMD: Tensor,
    v_BTMD: Tensor,
    scale: float,
    log_w_BT: Tensor | None,
    segments: Segments | None,
    own: OwnSlots,
) -> Tensor:
    """As `attend`, of own slots; where tokens have unlike numbers of them, with dead ones in between."""
    if own.places is None:
        short = log_w_BT is None and q_BTND.shape[1] <= _SHORT and q_BTND.device.type == "cpu"
        compute = _masked if short else kernel.compute
        return compute(q_BTND, k_BTMD, v_BTMD, scale, log_w_BT, segments, own.count)

    def filled(x: Tensor, value: float) -> Tensor:
        every = x.new_full((1, own.tokens * own.count, *x.shape[2:]), value)
        return every.index_copy(1, own.places, x).view(own.rows, -1, *x.shape[2:])

    whole = (filled(x, 0) for x in (q_BTND, k_BTMD, v_BTMD))
    y_BTND = _attend_own(kernel, *whole, scale, filled(log_w_BT, DEAD), segments, OwnSlots(own.count))
    return y_BTND.flatten(0, 1).unsqueeze(0).index_select(1, own.places)


def _masked(
    q_BTND: Tensor,
    k_BTMD: Tensor,
    v_BTMD: Tensor,
    scale: float,
    _: Tensor | None,
    segments: Segments | None,
    slots: int,
) -> Tensor:
    """As `own_attention`, with a mask of T × T: of few slots the quickest on a CPU."""
    places, grouped = torch.arange(q_BTND.shape[1]), q_BTND.shape[2] != k_BTMD.shape[2]
    token = places // slots
    seen = ((places % slots == 0) | (token == token[:, None])).tril()[None, None]
    if segments is not None:
        starts = segments.starts.view(len(q_BTND), -1).repeat_interleave(slots, 1)
        seen = seen & (starts[:, :, None] == starts[:, None])[:, None]
    q, k, v = (x.transpose(1, 2) for x in (q_BTND, k_BTMD, v_BTMD))
    bias = torch.zeros(seen.shape, dtype=q.dtype).masked_fill(~seen, -torch.inf)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale, enable_gqa=grouped).transpose(1, 2)


def _turned(x: Tensor, angles: Rotation | None, channels: Tensor | None) -> Tensor:
    """Rotated, with further channels behind those of every head."""
    if angles is not None:
        return rotate(x, angles, channels)
    if channels is None:
        return x
    return torch.cat([x, channels.unsqueeze(2).expand(*x.shape[:3], -1)], -1)


def _sdpa(
    q_BTND: Tensor, k_BTMD: Tensor, v_BTMD: Tensor, scale: float, _: Tensor | None, segments: Segments | None
) -> Tensor:
    """PyTorch's own kernels."""
    if segments is not None:
        flat = (x.flatten(0, 1) for x in (q_BTND, k_BTMD, v_BTMD))
        return segmented_attention(*flat, scale, segments).unflatten(0, q_BTND.shape[:2])
    out = F.scaled_dot_product_attention(
        q_BTND.transpose(1, 2),
        k_BTMD.transpose(1, 2),
        v_BTMD.transpose(1, 2),
        is_causal=True,
        scale=scale,
        enable_gqa=q_BTND.shape[2] != k_BTMD.shape[2],
    )
    return out.transpose(1, 2)


def _varlen(
    q_BTND: Tensor, k_BTMD: Tensor, v_BTMD: Tensor, scale: float, _: Tensor | None, segments: Segments | None
) -> Tensor:
    """PyTorch's flash kernel for sequences of several lengths."""
    (batch, length, heads, _), flat = q_BTND.shape, [x.flatten(0, 1) for x in (q_BTND, k_BTMD, v_BTMD)]
    if segments is None:
        bounds = torch.arange(0, batch * length + 1, length, dtype=torch.int32, device=q_BTND.device)
    else:
        bounds, length = segments.bounds, segments.longest
    grouped = {"enable_gqa": True} if heads != k_BTMD.shape[2] else {}
    out = varlen.varlen_attn(*flat, bounds, bounds, length, length, scale=scale, window_size=(-1, 0), **grouped)
    return out.unflatten(0, q_BTND.shape[:2])


def _value_side(
    q_BTND: Tensor, k_BTMD: Tensor, v_BTMD: Tensor, scale: float, log_w_BT: Tensor | None, _: Segments | None
) -> Tensor:
    """Σ p w v / Σ p w, by SDPA with values [w v, w]; queries and keys keep their size where kernels allow two."""
    if log_w_BT is None:
        return _sdpa(q_BTND, k_BTMD, v_BTMD, scale, None, None)
    head_size, w_BT11 = v_BTMD.shape[-1], log_w_BT.exp().to(v_BTMD.dtype)[..., None, None]
    w_BTMF = F.pad(w_BT11, (0, FOLDED_CHANNELS - 1)).expand(*v_BTMD.shape[:3], -1)
    widened = torch.cat([w_BT11 * v_BTMD, w_BTMF], -1)
    if q_BTND.device.type == "cpu":  # whose kernel has one size
        q_BTND, k_BTMD = (F.pad(x, (0, FOLDED_CHANNELS)) for x in (q_BTND, k_BTMD))
    y_BTNE = _sdpa(q_BTND, k_BTMD, widened, scale, None, None)
    return y_BTNE[..., :head_size] / y_BTNE[..., head_size : head_size + 1]


def _flash_width(channels: int) -> int:
    """The least head size that flash kernels are compiled for."""
    return next((width for width in (32, 64, 96, 128, 192, 256) if channels <= width), channels)


def _unless(*needs: tuple[bool, str]) -> str | None:
    """The first need that is not met."""
    return next((words for met, words in needs if not met), None)


_HALF = (torch.bfloat16, torch.float16)
_TRITON = Kernel(
    "triton",
    weighted_attention,
    lambda call: _unless(
        (call.device == "cuda", "a GPU"),
        (call.dtype in (*_HALF, torch.float32), "training.precision bf16 or fp32"),
        (call.head_size <= 128, "heads of at most 128 channels, model.head_size"),
    ),
    carried="apart",
    block=64,
    width=padded,
    backward=3.5,  # queries and keys have kernels of their own, each of which computes logits and their gradient
)
# In the order in which calls look for one. What no GPU has timed comes after what PyTorch has.
_KERNELS = (
    Kernel("sdpa", _sdpa, lambda call: _unless((call.device == "cpu", "a CPU")), block=512),
    Kernel(
        "sdpa",
        _sdpa,
        lambda call: _unless((not call.segmented, "data.reset_at_eod false on GPUs")),
        width=_flash_width,
    ),
    Kernel(
        "varlen",
        _varlen,
        lambda call: _unless((call.device == "cuda", "a GPU"), (call.dtype in _HALF, "training.precision bf16")),
        width=_flash_width,
    ),
    _TRITON,
    Kernel(
        "value_side",
        _value_side,
        lambda call: _unless((not call.segmented, "data.reset_at_eod false")),
        carried="values",
        width=_flash_width,
    ),
)
# Of slots of which all but a token's first are seen by their own token alone.
_OWN_KERNELS = (
    Kernel("sdpa", own_attention, lambda call: _unless((call.device == "cpu", "a CPU")), carried="apart", block=512),
    _TRITON._replace(compute=own_attention),
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
