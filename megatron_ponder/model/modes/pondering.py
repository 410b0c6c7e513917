"""The modes of the paper, `vanilla`, `fixed` and `adaptive`: what is asked of the passes of any mode, and theirs."""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from megatron_ponder.model.ends import Back, Front
from megatron_ponder.model.geometry import Geometry
from megatron_ponder.model.passes import PassState, enter_pass, kept_slots, leave_pass, pass_slots
from megatron_ponder.model.router import Routing
from megatron_ponder.parallel.mesh import Axis
from megatron_ponder.parallel.sharding import Initializer, ShardedModule

Shape = tuple[int, ...]
State = tuple[Tensor | None, Tensor | None]


class Stream(NamedTuple):
    """What goes through the blocks of a pass, and from rank to rank of a pipeline.

    Attributes:
        x_BTH: the residual stream.
        log_w_BT: log weight of each slot as a key; None where every weight is 1.
        inputs_BTH: what entered the first block, carried along if the next pass adds to it; else None.
    """

    x_BTH: Tensor
    log_w_BT: Tensor | None = None
    inputs_BTH: Tensor | None = None


class PassResult(NamedTuple):
    """What a pass gave.

    Attributes:
        hidden_BLSH: hidden states of the kept slots.
        routing: from those of the first slots; None without a router.
        inputs_BTH: as in `Stream`.
        geometry: positions and segments.
        ran_BL: int64, latent steps that each token ran in this pass, where a rule prunes; None where that is all.
    """

    hidden_BLSH: Tensor
    routing: Routing | None
    inputs_BTH: Tensor | None
    geometry: Geometry
    ran_BL: Tensor | None = None


class LatentReads(NamedTuple):
    """What n latent slots of a forward of generation read of the forward before, which ran T slots of any sequences.

    Attributes:
        read_TX: what `Passes.read_by_latents` gave of that forward.
        inputs_TH: what entered its first block.
        sources_n: int64, which of its slots is the one before each latent slot.
        steps_n: int64, of each latent slot, from 1 up.
    """

    read_TX: Tensor
    inputs_TH: Tensor
    sources_n: Tensor
    steps_n: Tensor


class Sizes(NamedTuple):
    """Sizes of a micro-batch.

    Attributes:
        batch: B, sequences.
        tokens: L, of a sequence.
        share: those of them that one rank holds in the residual stream.
        hidden_size: H.
        vocab_size: V.
    """

    batch: int
    tokens: int
    share: int
    hidden_size: int
    vocab_size: int


class Passes:
    """The passes of `vanilla` and `fixed`, one after another; another mode overrides what it does otherwise.

    Attributes:
        steps: K.
        own: the slots of latent steps are seen by their own token alone.
        interleaved: every pass reads the embedded tokens, with their latents between them; otherwise only the first
            does, and each pass has keys of its own.
        routed: a router weighs the steps of each token.
        predicts: every pass but the last ends in a prediction that the next one reads.
        state_type: what one pass hands to the next: a tensor of activations, and one of numbers in fp32 or better.
    """

    interleaved = True
    routed = False
    predicts = False
    state_type = PassState

    def __init__(self, steps: int, own: bool = False) -> None:
        self.steps, self.own = steps, own

    def learned_inputs(self, hidden_size: int, axis: Axis, initialize: Initializer) -> dict[str, ShardedModule]:
        """What else the mode learns at the front, by its name in the model; each is called with the scale of inputs.

        Args:
            hidden_size: H.
            axis: the tensor ranks.
            initialize: fills what stands beside rows of the embedding.
        """
        return {}

    @property
    def iterated(self) -> bool:
        """Whether the passes approach a fixed point, for which R matters; otherwise they are the definition.

        Where a token's latents depend on tokens and on its own latents alone, they are right once they have grown.
        """
        return self.steps > 0 and not self.own

    def runs_once(self, gradient_passes: int | None = None) -> bool:
        """Whether a whole model runs every slot once, one slot a token in each of K + 1 passes (`slotwise.py`).

        Where no other token sees latents, nothing that a slot reads changes from one growth pass to the next. Not where
        some passes are without gradients: a growth pass after them has those of all its slots.

        Args:
            gradient_passes: through how many of the last passes gradients flow; None for all.
        """
        return self.own and self.steps > 0 and (gradient_passes is None or gradient_passes > self.steps)

    def plan(self, refinements: int, latents: bool = True, once: bool = False) -> tuple[int, ...]:
        """Slots per token of every pass.

        Args:
            refinements: R.
            latents: whether there are latent steps; without them one pass over the tokens is all.
            once: every slot is run once, as `runs_once` says of a whole model; else the passes are those that ranks of
                a pipeline run, which hand on no keys.
        """
        if not latents:
            return (1,)
        return (1,) * (self.steps + 1) if once else self.full_plan(refinements)

    def full_plan(self, refinements: int) -> tuple[int, ...]:
        """Slots per token of every pass with latent steps and R refinements."""
        return pass_slots(self.steps, refinements if self.iterated else 0)

    def kept(self, index: int, plan: tuple[int, ...]) -> slice:
        """The slots of pass `index` whose hidden states anybody reads."""
        return kept_slots(index, plan, self.routed)

    def enter(self, front: Front, embedded_BLH: Tensor | None, state: State | None) -> Stream:
        """What enters the blocks.

        Args:
            front: of the model.
            embedded_BLH: e of every token; needed in the first pass, and in every one if `interleaved`.
            state: what the pass before handed over; None in the first.
        """
        if state is not None and state.latents is not None:
            state = state._replace(latents=front.latent_scale(state.latents))
        return Stream(*enter_pass(embedded_BLH, state or PassState()))

    def leave(self, back: Back, result: PassResult, log_w_BLK: Tensor | None, next_slots: int) -> State:
        """What to hand to the next pass.

        Args:
            back: of the model.
            result: of this pass.
            log_w_BLK: log weights of all K + 1 steps that this pass's routing gives; None where there is no router.
            next_slots: slots per token of the next pass.
        """
        return leave_pass(result.hidden_BLSH, log_w_BLK, next_slots)

    def most_slots(self, tokens: int) -> int:
        """The most slots that a cache holds of so many tokens; of those that no other token sees, the newest's."""
        return tokens + self.steps if self.own else tokens * (self.steps + 1)

    def cached_slots(self, executed: Sequence[int]) -> int:
        """Those that it keeps of complete tokens, by the latent steps of each."""
        return len(executed) + (0 if self.own else sum(executed))

    def kv_entries(self, mean_steps: float) -> float:
        """Cached slots of a token in the mean, where so many latent steps are executed."""
        return 1.0 if self.own else 1 + mean_steps

    @property
    def lanes(self) -> int:
        """How many lines of keys a sequence has: one, or one for each pass with keys of its own."""
        return 1 if self.interleaved else self.steps + 1

    def read_by_latents(self, back: Back, hidden_TH: Tensor, unfinished_n: Tensor | None) -> Tensor:
        """What the next forward's latent slots read of this one in generation, (T, X), on the last pipeline rank.

        Args:
            back: of the model.
            hidden_TH: hidden states of the slots.
            unfinished_n: int64, slots that a latent one may follow; None for all. Nobody reads what others give.
        """
        return hidden_TH

    def latent_inputs(self, front: Front, reads: LatentReads) -> Tensor:
        """What enters the latent slots in generation, (n, H), on the first pipeline rank."""
        return front.latent_scale(reads.read_TX[reads.sources_n])

    def pack_stream(self, stream: Stream) -> tuple[Tensor, Tensor | None]:
        """One tensor of activations and one of other numbers, which travel between two ranks of a pass."""
        return stream.x_BTH, stream.log_w_BT

    def unpack_stream(self, x: Tensor, wide: Tensor | None) -> Stream:
        """What `pack_stream` packed."""
        return Stream(x, wide)

    def stream_shapes(self, sizes: Sizes, index: int, plan: tuple[int, ...]) -> tuple[Shape, Shape | None]:
        """Shapes of what `pack_stream` gives in pass `index`."""
        slots = sizes.share * plan[index]
        return (sizes.batch, slots, sizes.hidden_size), (sizes.batch, slots) if self.routed and index > 0 else None

    def state_shapes(self, sizes: Sizes, index: int, plan: tuple[int, ...]) -> tuple[Shape, Shape | None]:
        """Shapes of the two tensors that pass `index` hands to the next."""
        batch, _, share, hidden_size, _ = sizes
        slots = plan[index + 1]
        return (batch, share, slots - 1, hidden_size), (batch, share, slots) if self.routed else None


class RoutedPasses(Passes):
    """The passes of `adaptive`."""

    routed = True
