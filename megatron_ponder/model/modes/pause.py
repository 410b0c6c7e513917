"""`pause`: one pass over the tokens, each with K learned pause embeddings behind it.

`sps` has the same, but no other token sees them (`Passes.own`): state–prediction separation, arXiv 2607.01218.
"""

from torch import Tensor

from megatron_ponder.model.ends import Front
from megatron_ponder.model.modes.pondering import LatentReads, Passes, Stream
from megatron_ponder.model.passes import PassState, enter_pass
from megatron_ponder.parallel.mesh import Axis
from megatron_ponder.parallel.sharding import Initializer, ParameterSpec, ShardedModule


class PauseEmbedding(ShardedModule):
    """K learned vectors, like further rows of the embedding table."""

    def __init__(self, steps: int, hidden_size: int, axis: Axis, initialize: Initializer) -> None:
        super().__init__(axis)
        self.declare("weight", ParameterSpec((steps, hidden_size), initialize))

    def forward(self, scale: float) -> Tensor:
        """The vectors times a scale, (K, H), for the residual stream."""
        return self.weight * scale


class PausePasses(Passes):
    """Pause embeddings are scaled as tokens are, and carry their token's position; the output is at the last."""

    iterated = False

    def runs_once(self, gradient_passes: int | None = None) -> bool:
        """Whether every slot is run in a pass of its own: not here, where one pass runs them all."""
        return False

    def full_plan(self, refinements: int) -> tuple[int, ...]:
        return (self.steps + 1,)

    def learned_inputs(self, hidden_size: int, axis: Axis, initialize: Initializer) -> dict[str, ShardedModule]:
        return {"pauses": PauseEmbedding(self.steps, hidden_size, axis, initialize)}

    def enter(self, front: Front, embedded_BLH: Tensor | None, state: PassState | None) -> Stream:
        pauses_KH = front.learned["pauses"](front.scale)
        return Stream(*enter_pass(embedded_BLH, PassState(pauses_KH.expand(*embedded_BLH.shape[:2], -1, -1))))

    def latent_inputs(self, front: Front, reads: LatentReads) -> Tensor:
        return front.learned["pauses"](front.scale)[reads.steps_n - 1]
