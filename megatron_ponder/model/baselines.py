"""The methods that pondering is compared with; each is the passes of another mode.

    pause      one pass over the tokens, each with K learned pause embeddings behind it
    loop       K + 1 passes over the tokens; each reads the hidden states of the pass before
    ponderlm   K + 1 passes over the tokens; each reads e_t and the mean embeddings of all predictions before it

They share everything else with the paper's modes: transformer, embedding scale, initialisation, loss.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from megatron_ponder.model.passes import Ends, LatentReads, Passes, PassResult, PassState, Shape, Sizes, Stream
from megatron_ponder.parallel.candidates import likeliest
from megatron_ponder.parallel.mesh import Axis
from megatron_ponder.parallel.regions import enter, on_residual
from megatron_ponder.parallel.sharding import Initializer, ParameterSpec, ShardedModule

# A prediction is read through its likeliest tokens alone, as in arXiv 2505.20674.
CANDIDATES = 100


class PauseEmbedding(ShardedModule):
    """K learned vectors, like further rows of the embedding table."""

    def __init__(self, steps: int, hidden_size: int, axis: Axis, initialize: Initializer) -> None:
        super().__init__(axis)
        self.declare("weight", ParameterSpec((steps, hidden_size), initialize))

    def forward(self, scale: float) -> Tensor:
        """The vectors times a scale, (K, H), for the residual stream."""
        return on_residual(self.weight, self.axis) * scale


class PausePasses(Passes):
    """Pause embeddings are scaled as tokens are, and carry their token's position; the output is at the last."""

    pauses = True
    iterated = False

    def plan(self, refinements: int) -> tuple[int, ...]:
        return (self.steps + 1,)

    def enter(self, model: Ends, embedded_BLH: Tensor | None, state: PassState | None) -> Stream:
        pauses_KH = model.pauses(model.ponder_config.embedding_scale)
        latents = pauses_KH.expand(*embedded_BLH.shape[:2], -1, -1)
        return super().enter(model, embedded_BLH, PassState(latents))

    def latent_inputs(self, model: Ends, reads: LatentReads) -> Tensor:
        return model.pauses(model.ponder_config.embedding_scale)[reads.steps_n - 1]


class LoopPasses(Passes):
    """The hidden states that enter the next pass are those after the final norm, as latents are."""

    interleaved = False
    iterated = False

    def plan(self, refinements: int) -> tuple[int, ...]:
        return (1,) * (self.steps + 1)

    def kept(self, index: int, plan: tuple[int, ...]) -> slice:
        return slice(0, 1)

    def enter(self, model: Ends, embedded_BLH: Tensor | None, state: PassState | None) -> Stream:
        return Stream(embedded_BLH if state is None else state.latents.squeeze(2))

    def leave(self, model: Ends, result: PassResult, log_w_BLK: Tensor | None, next_slots: int) -> PassState:
        return PassState(result.hidden_BLSH)

    def state_shapes(self, sizes: Sizes, index: int, plan: tuple[int, ...]) -> tuple[Shape, Shape | None]:
        return (sizes.batch, sizes.share, 1, sizes.hidden_size), None


class Prediction(NamedTuple):
    """What a pass of `ponderlm` hands to the next.

    Attributes:
        inputs_BLH: its own input, which the next pass adds to.
        candidates_BL2n: on all tensor ranks, probabilities of the likeliest tokens, which sum to 1, and their ids.
    """

    inputs_BLH: Tensor
    candidates_BL2n: Tensor


class PonderLMPasses(LoopPasses):
    """Input of pass s + 1: e_t + Σ_{i ≤ s} c · Σ_v p_i(v) E[v], over the likeliest tokens v of pass i's prediction."""

    predicts = True
    state_type = Prediction

    def enter(self, model: Ends, embedded_BLH: Tensor | None, state: Prediction | None) -> Stream:
        if state is None:
            return Stream(embedded_BLH, inputs_BTH=embedded_BLH)
        inputs = self._add(model, state.inputs_BLH, state.candidates_BL2n)
        return Stream(inputs, inputs_BTH=inputs)

    def leave(self, model: Ends, result: PassResult, log_w_BLK: Tensor | None, next_slots: int) -> Prediction:
        hidden_BLH = enter(result.hidden_BLSH.squeeze(2), model.axis, result.layout.tokens)
        return Prediction(result.inputs_BTH, self._predict(model, hidden_BLH))

    def read_by_latents(self, model: Ends, hidden_TH: Tensor, unfinished_T: Tensor) -> Tensor:
        candidates_U2n = self._predict(model, hidden_TH[unfinished_T])
        numbers = candidates_U2n.flatten(1).view(hidden_TH.dtype)  # bit by bit, in the slots of a narrower type
        return numbers.new_zeros(len(hidden_TH), numbers.shape[1]).masked_scatter_(unfinished_T.unsqueeze(1), numbers)

    def latent_inputs(self, model: Ends, reads: LatentReads) -> Tensor:
        numbers = reads.read_TX[reads.sources_n]
        candidates_n2n = numbers.view(torch.promote_types(numbers.dtype, torch.float32)).unflatten(1, (2, -1))
        return self._add(model, reads.inputs_TH[reads.sources_n], candidates_n2n)

    def _predict(self, model: Ends, hidden: Tensor) -> Tensor:
        """(.., H) on all tensor ranks → candidates (.., 2, n)."""
        logits, ids = likeliest(model.head(hidden), CANDIDATES, model.axis, model.model_config.vocab_size)
        return torch.stack([logits.softmax(-1), ids.to(logits.dtype)], -2)

    def _add(self, model: Ends, inputs: Tensor, candidates: Tensor) -> Tensor:
        """Inputs of the next pass, from those of this one and the candidates (.., 2, n) of its prediction."""
        probabilities, ids = candidates.unbind(-2)
        return inputs + model.embed(ids.long(), probabilities)

    def pack_stream(self, stream: Stream) -> tuple[Tensor, Tensor | None]:
        return torch.stack([stream.x_BTH, stream.inputs_BTH]), None

    def unpack_stream(self, x: Tensor, wide: Tensor | None) -> Stream:
        return Stream(x[0], inputs_BTH=x[1])

    def stream_shapes(self, sizes: Sizes, index: int, plan: tuple[int, ...]) -> tuple[Shape, Shape | None]:
        return (2, sizes.batch, sizes.share, sizes.hidden_size), None

    def state_shapes(self, sizes: Sizes, index: int, plan: tuple[int, ...]) -> tuple[Shape, Shape | None]:
        candidates = (sizes.batch, sizes.tokens, 2, min(CANDIDATES, sizes.vocab_size))
        return (sizes.batch, sizes.share, sizes.hidden_size), candidates
