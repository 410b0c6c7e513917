"""`ponderlm`: K + 1 passes over the tokens; each reads e_t and the mean embeddings of all predictions before it."""

from typing import NamedTuple

import torch
from torch import Tensor

from megatron_ponder.model.ends import Back, Front
from megatron_ponder.model.modes.loop import LoopPasses
from megatron_ponder.model.modes.pondering import LatentReads, PassResult, Shape, Sizes, Stream
from megatron_ponder.parallel.regions import enter

# A prediction is read through its likeliest tokens alone, as in arXiv 2505.20674.
CANDIDATES = 100


def candidates(vocabulary: int) -> int:
    """n, the likeliest tokens through which a prediction is read, of a vocabulary or of a rank's part of it."""
    return min(CANDIDATES, vocabulary)


class PassPrediction(NamedTuple):
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
    state_type = PassPrediction

    def enter(self, front: Front, embedded_BLH: Tensor | None, state: PassPrediction | None) -> Stream:
        if state is None:
            return Stream(embedded_BLH, inputs_BTH=embedded_BLH)
        inputs = _add(front, state.inputs_BLH, state.candidates_BL2n)
        return Stream(inputs, inputs_BTH=inputs)

    def leave(self, back: Back, result: PassResult, log_w_BLK: Tensor | None, next_slots: int) -> PassPrediction:
        hidden_BLH = enter(result.hidden_BLSH.squeeze(2), back.axis, result.geometry.tokens)
        return PassPrediction(result.inputs_BTH, _predict(back, hidden_BLH))

    def read_by_latents(self, back: Back, hidden_TH: Tensor, unfinished_n: Tensor | None) -> Tensor:
        candidates_U2n = _predict(back, hidden_TH if unfinished_n is None else hidden_TH[unfinished_n])
        numbers = candidates_U2n.flatten(1).view(hidden_TH.dtype)  # bit by bit, in the slots of a narrower type
        if unfinished_n is None:
            return numbers
        return numbers.new_zeros(len(hidden_TH), numbers.shape[1]).index_copy_(0, unfinished_n, numbers)

    def latent_inputs(self, front: Front, reads: LatentReads) -> Tensor:
        numbers = reads.read_TX[reads.sources_n]
        candidates_n2n = numbers.view(torch.promote_types(numbers.dtype, torch.float32)).unflatten(1, (2, -1))
        return _add(front, reads.inputs_TH[reads.sources_n], candidates_n2n)

    def pack_stream(self, stream: Stream) -> tuple[Tensor, Tensor | None]:
        return torch.stack([stream.x_BTH, stream.inputs_BTH]), None

    def unpack_stream(self, x: Tensor, wide: Tensor | None) -> Stream:
        return Stream(x[0], inputs_BTH=x[1])

    def stream_shapes(self, sizes: Sizes, index: int, plan: tuple[int, ...]) -> tuple[Shape, Shape | None]:
        return (2, sizes.batch, sizes.share, sizes.hidden_size), None

    def state_shapes(self, sizes: Sizes, index: int, plan: tuple[int, ...]) -> tuple[Shape, Shape | None]:
        predicted = (sizes.batch, sizes.tokens, 2, candidates(sizes.vocab_size))
        return (sizes.batch, sizes.share, sizes.hidden_size), predicted


def _predict(back: Back, hidden: Tensor) -> Tensor:
    """(.., H) on all tensor ranks → candidates (.., 2, n)."""
    logits, ids = back.likeliest(hidden, candidates(back.vocab_size))
    return torch.stack([logits.softmax(-1), ids.to(logits.dtype)], -2)


def _add(front: Front, inputs: Tensor, candidates: Tensor) -> Tensor:
    """Inputs of the next pass, from those of this one and the candidates (.., 2, n) of its prediction."""
    probabilities, ids = candidates.unbind(-2)
    return inputs + front.embed(ids.long(), probabilities)
