"""The algorithm: one training forward is a fixed chain of passes of the same transformer.

Growth pass i = 0..K-1 runs i + 1 slots a token and gives every token one latent more; R refinement passes run all K + 1
slots and replace all latents at once (Jacobi iteration of z_{t,k} = h_{t,k-1}); the final pass gives the hidden states
for the output. In `adaptive` mode every pass also routes from its own h_{t,0}, and the next pass uses that log w.

This file alone says so; plain training, pipelines, evaluation and the exact fixed point all run their passes through
`Passes`. What other modes do otherwise is said in `baselines.py`.
"""

from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from megatron_ponder.config import ModelConfig, PonderConfig
from megatron_ponder.kernels.rotary import Rotation
from megatron_ponder.model.rope import rotation
from megatron_ponder.model.router import Routing
from megatron_ponder.parallel.mesh import Axis

Shape = tuple[int, ...]
State = tuple[Tensor | None, Tensor | None]


class PassState(NamedTuple):
    """What one pass hands to the next.

    Attributes:
        latents: (B, L, n, H), z_{t,1} .. z_{t,n}; None before the first pass.
        log_w: (B, L, n + 1), log weights of the next pass's slots as keys; None where every weight is 1.
    """

    latents: Tensor | None = None
    log_w: Tensor | None = None


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
        layout: positions and visibility.
    """

    hidden_BLSH: Tensor
    routing: Routing | None
    inputs_BTH: Tensor | None
    layout: "Interleaving"


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


class Ends(Protocol):
    """The two ends of a model, as its passes see them; a pipeline rank may have one of them, or neither.

    Attributes:
        model_config, ponder_config: of the model.
        axis: the tensor ranks.
        pauses: learned vectors, (K, H) times the scale that it is called with; None unless the passes want them.
        head: hidden states (..., H) on all tensor ranks → logits of this rank's part of the vocabulary.
    """

    model_config: ModelConfig
    ponder_config: PonderConfig
    axis: Axis
    pauses: nn.Module | None
    head: nn.Module | None

    def embed(self, tokens: Tensor, weights: Tensor | None = None) -> Tensor:
        """e = c · E[x] in the residual stream: (...) ids → (..., H); of (..., n) ids with weights the sum over n."""


class Passes:
    """The passes of `vanilla`, `fixed` and `adaptive`, one after another; a baseline overrides what it does otherwise.

    Attributes:
        steps: K.
        routed: a router weighs the steps of each token.
        interleaved: every pass reads the embedded tokens, with their latents between them; otherwise only the first
            does, and each pass has keys of its own.
        pauses: there are learned pause embeddings.
        predicts: every pass but the last ends in a prediction that the next one reads.
        state_type: what one pass hands to the next: a tensor of activations, and one of numbers in fp32 or better.
    """

    interleaved = True
    pauses = False
    predicts = False
    state_type = PassState

    def __init__(self, steps: int, routed: bool = False) -> None:
        self.steps, self.routed = steps, routed

    @property
    def iterated(self) -> bool:
        """Whether the passes approach a fixed point, for which R matters; otherwise they are the definition."""
        return self.steps > 0

    def plan(self, refinements: int) -> tuple[int, ...]:
        """Slots per token of every pass, with R refinements."""
        return pass_slots(self.steps, refinements)

    def kept(self, index: int, plan: tuple[int, ...]) -> slice:
        """The slots of pass `index` whose hidden states anybody reads."""
        return kept_slots(index, plan, self.routed)

    def enter(self, model: Ends, embedded_BLH: Tensor | None, state: State | None) -> Stream:
        """What enters the blocks.

        Args:
            model: with the embeddings.
            embedded_BLH: e of every token; needed in the first pass, and in every one if `interleaved`.
            state: what the pass before handed over; None in the first.
        """
        return Stream(*enter_pass(embedded_BLH, state or PassState()))

    def leave(self, model: Ends, result: PassResult, log_w_BLK: Tensor | None, next_slots: int) -> State:
        """What to hand to the next pass.

        Args:
            model: with the head.
            result: of this pass.
            log_w_BLK: log weights of all K + 1 steps that this pass's routing gives; None where there is no router.
            next_slots: slots per token of the next pass.
        """
        return leave_pass(result.hidden_BLSH, log_w_BLK, next_slots)

    @property
    def lanes(self) -> int:
        """How many lines of keys a sequence has: one, or one for each pass with keys of its own."""
        return 1 if self.interleaved else self.steps + 1

    def read_by_latents(self, model: Ends, hidden_TH: Tensor, unfinished_T: Tensor) -> Tensor:
        """What the next forward's latent slots read of this one in generation, (T, X), on the last pipeline rank.

        Args:
            model: with the head.
            hidden_TH: hidden states of the slots.
            unfinished_T: bool, whether a latent slot may follow.
        """
        return hidden_TH

    def latent_inputs(self, model: Ends, reads: LatentReads) -> Tensor:
        """What enters the latent slots in generation, (n, H), on the first pipeline rank."""
        return reads.read_TX[reads.sources_n]

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


def pass_slots(max_steps: int, refinements: int) -> tuple[int, ...]:
    """Slots per token of every pass: 1, 2, .., K, then R + 1 times K + 1. Without steps there is one pass."""
    if max_steps == 0:
        return (1,)
    return (*range(1, max_steps + 1), *[max_steps + 1] * (refinements + 1))


def kept_slots(index: int, plan: tuple[int, ...], fused: bool) -> slice:
    """The slots of pass `index` whose hidden states anybody reads; the last block need not finish the others.

    The next pass reads as many as it has latents, and the output reads all slots if it fuses them, else the last.
    """
    if index + 1 < len(plan):
        return slice(0, plan[index + 1] - 1)
    return slice(0, plan[index]) if fused else slice(plan[index] - 1, plan[index])


def enter_pass(embedded_BLH: Tensor, state: PassState) -> tuple[Tensor, Tensor | None]:
    """The interleaved sequence e_1, z_{1,1} .. z_{1,n}, e_2, .. (B, L (n + 1), H) and its log w (B, L (n + 1))."""
    slots_BLSH = embedded_BLH.unsqueeze(2)
    if state.latents is not None:
        slots_BLSH = torch.cat([slots_BLSH, state.latents], 2)
    log_w = None if state.log_w is None else state.log_w.flatten(1, 2)
    return slots_BLSH.flatten(1, 2), log_w


def leave_pass(h_BLSH: Tensor, log_w_BLK: Tensor | None, next_slots: int) -> PassState:
    """Hand over to a pass of `next_slots` slots a token: z_{t,j+1} := h_{t,j}.

    Args:
        h_BLSH: hidden states of the slots that this pass kept, the first of each token among them.
        log_w_BLK: log weights of all K + 1 steps that this pass's routing gives; None where there is no router.
        next_slots: at most one more than this pass had.
    """
    log_w = None if log_w_BLK is None else log_w_BLK[:, :, :next_slots]
    return PassState(h_BLSH[:, :, : next_slots - 1], log_w)


@dataclass
class Interleaving:
    """Positions and visibility of the interleaved sequence, for every number of slots that the passes use.

    Attributes:
        positions_BL: int64 (B or 1, L), the RoPE position of each token and of all its slots.
        documents_BL: int64 (B, L), number of the document that a token belongs to; None if attention may cross
            documents.
    """

    positions_BL: Tensor
    documents_BL: Tensor | None = None
    _angles: dict[int, Rotation] = field(default_factory=dict)
    _masks: dict[int, Tensor | None] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        """L."""
        return self.positions_BL.shape[1]

    def angles(self, slots: int, config: ModelConfig, dtype: torch.dtype) -> Rotation:
        """Rotations of the L · slots positions."""
        if slots not in self._angles:
            base = rotation(self.positions_BL, config.rotated_channels, config.rope_theta, dtype)
            self._angles[slots] = base.repeat(slots)
        return self._angles[slots]

    def mask(self, slots: int) -> Tensor | None:
        """Causal attention within documents, bool (B, 1, L · slots, L · slots); None for plain causal attention."""
        if self.documents_BL is None:
            return None
        if slots not in self._masks:
            documents = self.documents_BL.repeat_interleave(slots, 1)
            same = documents.unsqueeze(2) == documents.unsqueeze(1)
            self._masks[slots] = same.tril().unsqueeze(1)
        return self._masks[slots]


def interleaving(tokens_BL: Tensor, eod_id: int | None) -> Interleaving:
    """Positions 0, 1, .. of a batch; with `eod_id`, restarting after each such token, which ends its document."""
    count = torch.arange(tokens_BL.shape[1], device=tokens_BL.device)
    if eod_id is None:
        return Interleaving(count.unsqueeze(0))
    ends = (tokens_BL == eod_id).long()
    documents = ends.cumsum(1) - ends
    first = torch.zeros_like(documents)
    first[:, 1:] = torch.where(ends[:, :-1] == 1, count[1:], 0)
    return Interleaving(count - first.cummax(1).values, documents)
