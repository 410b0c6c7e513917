"""Causal self-attention in which a key may carry a weight: log w is added to its logit for every query."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from torch import Tensor

from megatron_ponder.config import ModelConfig
from megatron_ponder.config.run import AttentionKernel
from megatron_ponder.kernels.attention import OwnSlots, attend, attend_latent
from megatron_ponder.kernels.rotary import Rotation, rotate
from megatron_ponder.kernels.segments import Segments
from megatron_ponder.model.norms import RMSNorm
from megatron_ponder.parallel.context import SlotShares, take_heads, take_slots
from megatron_ponder.parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron_ponder.parallel.mesh import Axis
from megatron_ponder.parallel.regions import enter
from megatron_ponder.parallel.sharding import ShardedModule, normal


class LayerCache(Protocol):
    """Where one layer keeps the keys and values of executed slots."""

    def attend(self, q_BTND: Tensor, k_BTMD: Tensor, v_BTMD: Tensor, scale: float) -> Tensor:
        """Store the slots being run and attend from each to those of its sequence up to itself.

        Args:
            q_BTND: queries.
            k_BTMD, v_BTMD: keys, whose log weights the cache knows, and values.
            scale: factor on the logits.

        Returns:
            (B, T, N, D).
        """


# Of slots, (B, T, M, D) each, as attention reads them.
KeysAndValues = tuple[Tensor, Tensor]


class StepSlots(NamedTuple):
    """The slots of one latent step k of B rows of L tokens; those of the steps before it were run by other passes.

    Attributes:
        earlier: in this block, keys and values of the steps 0 .. k - 1 of all these tokens, on this rank's heads.
        log_w_BLK: log weights of the steps 1 .. k as keys, on all tensor ranks; of context ranks those of all tokens.
            None where every weight is 1, and of first slots, k = 0.
        places: int64, which of the B · L tokens of this rank run the step; None if all do.
        rows: B.
        length: L, of this rank's share of a row.
    """

    earlier: tuple[KeysAndValues, ...] = ()
    log_w_BLK: Tensor | None = None
    places: Tensor | None = None
    rows: int = 1
    length: int = 0

    def spread(self, x_BTND: Tensor) -> Tensor:
        """(B, T, N, D) of the slots that are run → (B, L, N, D) of all tokens of this rank, zeros of the others."""
        if self.places is None:
            return x_BTND
        every = x_BTND.new_zeros(1, self.rows * self.length, *x_BTND.shape[2:])
        return every.index_copy(1, self.places, x_BTND).view(self.rows, self.length, *x_BTND.shape[2:])

    def collect(self, x_BLND: Tensor) -> Tensor:
        """Back to those that are run, one behind the other if they are not all."""
        return x_BLND if self.places is None else x_BLND.flatten(0, 1).unsqueeze(0).index_select(1, self.places)


class Slots(NamedTuple):
    """The slots of one forward, as every block sees them: S of each of L tokens, T = L · S in all.

    Attributes:
        tokens: L.
        angles: of the T slots.
        log_w_BT: log weight of each slot as a key, on all tensor ranks; None where every weight is 1. Of context ranks
            those of all, as attention sees them, and so for segments.
        segments: of the B · T slots, or of tokens where `own` is given; None if every row is one.
        kept: the slots of every token whose result is wanted; or int64, those of all of them.
        kernel: as in `training.attention_kernel`.
        packed: they are those of a packed pass, of which every forward has another number.
        shares: which of a row's slots context ranks have; None if this rank has them all.
        own: how they are those of tokens, if all but the first are seen by their own token alone.
        step: of which step they are, if others are run by passes of their own; None if the pass has all that they see.
    """

    tokens: int
    angles: Rotation
    log_w_BT: Tensor | None = None
    segments: Segments | None = None
    kept: slice | Tensor = slice(None)
    kernel: AttentionKernel = "auto"
    packed: bool = False
    shares: SlotShares | None = None
    own: OwnSlots | None = None
    step: StepSlots | None = None

    def keep(self, x: Tensor, tokens: int) -> Tensor:
        """(B, S slots of `tokens` tokens, ..) → (B, their kept slots, ..)."""
        if isinstance(self.kept, Tensor):
            return x.index_select(1, self.kept)
        return x if self.kept == slice(None) else x.unflatten(1, (tokens, -1))[:, :, self.kept].flatten(1, 2)


class Attention(ShardedModule):
    """Multi-head attention with rotary positions; optional are grouped-query heads, norms of heads, and key weights."""

    def __init__(self, config: ModelConfig, axis: Axis) -> None:
        super().__init__(axis)
        self.head_size = config.head_size
        hidden, bias, initial = config.hidden_size, config.qkv_biases, normal(config.init_std)
        q_size, kv_size = config.num_heads * config.head_size, config.num_kv_heads * config.head_size
        self.q_proj = ColumnParallelLinear(hidden, q_size, axis, initial, bias)
        self.k_proj = ColumnParallelLinear(hidden, kv_size, axis, initial, bias)
        self.v_proj = ColumnParallelLinear(hidden, kv_size, axis, initial, bias)
        norm = lambda: RMSNorm(config.head_size, config.norm_epsilon, axis, of_heads=True) if config.qk_norm else None
        self.q_norm, self.k_norm = norm(), norm()
        self.o_proj = RowParallelLinear(q_size, hidden, axis, normal(config.residual_std), config.other_biases)

    def project(self, x_BTH: Tensor) -> Sequence[Tensor]:
        """This rank's queries, keys and values, (B, T, heads · head size) each."""
        return self.q_proj(x_BTH), self.k_proj(x_BTH), self.v_proj(x_BTH)

    def forward(
        self, x_BTH: Tensor, slots: Slots, cache: LayerCache | None = None
    ) -> Tensor | tuple[Tensor, KeysAndValues]:
        """Attend from every slot to itself and the slots before it.

        Args:
            x_BTH: normed inputs in the residual stream.
            slots: what they are.
            cache: keys and values of earlier slots.

        Returns:
            (B, kept slots, H) in the residual stream; of the slots of a `step` also their keys and values, which those
            of later steps see.
        """
        x_BTH = enter(x_BTH, self.axis, slots.tokens)
        q, k, v = (y.unflatten(-1, (-1, self.head_size)) for y in self.project(x_BTH))
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        scale = self.head_size**-0.5
        if slots.step is not None:
            y, made = self._attend_step(q, k, v, scale, slots, slots.step)
            return self.o_proj(y.flatten(2), slots.tokens), made
        if cache is not None:
            y = cache.attend(rotate(q, slots.angles), rotate(k, slots.angles), v, scale)
        elif slots.shares is None:
            y = attend(q, k, v, scale, slots.log_w_BT, slots.segments, slots.angles, slots.kernel, slots.own)
        else:
            q, k = rotate(q, slots.angles), rotate(k, slots.angles)
            q, k, v = (take_heads(x, slots.shares) for x in (q, k, v))
            y = attend(q, k, v, scale, slots.log_w_BT, slots.segments, kernel=slots.kernel, own=slots.own)
            y = take_slots(y, slots.shares)
        y = slots.keep(y.flatten(2), slots.tokens)
        return self.o_proj(y, slots.tokens)

    def _attend_step(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float, slots: Slots, step: StepSlots
    ) -> tuple[Tensor, KeysAndValues]:
        """From the slots of one step to first slots and to their own token's; and the keys and values of the step."""
        q, k = rotate(q, slots.angles), rotate(k, slots.angles)
        q, k, v = (step.spread(x) for x in (q, k, v))
        if slots.shares is not None:
            q, k, v = (take_heads(x, slots.shares) for x in (q, k, v))
        if step.earlier:
            keys, values = zip(*step.earlier, (k, v), strict=True)
            y = attend_latent(q, keys, values, scale, step.log_w_BLK, slots.segments, slots.kernel)
        else:
            y = attend(q, k, v, scale, segments=slots.segments, kernel=slots.kernel)
        if slots.shares is not None:
            y = take_slots(y, slots.shares)
        return step.collect(y), (k, v)
