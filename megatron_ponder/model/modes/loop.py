"""`loop`: K + 1 passes over the tokens; each reads the hidden states of the pass before."""

from torch import Tensor

from megatron_ponder.model.ends import Back, Front
from megatron_ponder.model.modes.pondering import Passes, PassResult, Shape, Sizes, Stream
from megatron_ponder.model.passes import PassState


class LoopPasses(Passes):
    """The hidden states that enter the next pass are those after the final norm, as latents are."""

    interleaved = False
    iterated = False

    def full_plan(self, refinements: int) -> tuple[int, ...]:
        return (1,) * (self.steps + 1)

    def kept(self, index: int, plan: tuple[int, ...]) -> slice:
        return slice(0, 1)

    def enter(self, front: Front, embedded_BLH: Tensor | None, state: PassState | None) -> Stream:
        return Stream(embedded_BLH if state is None else front.latent_scale(state.latents.squeeze(2)))

    def leave(self, back: Back, result: PassResult, log_w_BLK: Tensor | None, next_slots: int) -> PassState:
        return PassState(result.hidden_BLSH)

    def state_shapes(self, sizes: Sizes, index: int, plan: tuple[int, ...]) -> tuple[Shape, Shape | None]:
        return (sizes.batch, sizes.share, 1, sizes.hidden_size), None
