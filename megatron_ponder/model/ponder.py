"""The language model: embedding, transformer, router and head, and its parallel evaluations."""

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from megatron_ponder.config import ModelConfig, PonderConfig
from megatron_ponder.model.attention import LayerCache
from megatron_ponder.model.passes import (
    Interleaving,
    PassState,
    enter_pass,
    interleaving,
    kept_slots,
    leave_pass,
    pass_slots,
)
from megatron_ponder.model.rope import rotation
from megatron_ponder.model.router import Pruning, Router, Routing, fusion_weights, key_log_weights, route
from megatron_ponder.model.transformer import Transformer
from megatron_ponder.parallel.layers import ColumnParallelLinear, VocabParallelEmbedding
from megatron_ponder.parallel.mesh import Mesh
from megatron_ponder.parallel.sharding import normal


@dataclass
class PonderOutput:
    """The result of a parallel evaluation.

    Attributes:
        output_BLH: what the head reads: h_{t,0}, h_{t,K} or the fused ĥ_t, by mode.
        hidden_BLSH: hidden states of the final pass's slots, of the last slot alone where only that is the output.
        routing: the final pass's routing; None unless the mode is `adaptive`.
        passes: how many passes were run.
    """

    output_BLH: Tensor
    hidden_BLSH: Tensor
    routing: Routing | None
    passes: int


class PonderLM(nn.Module):
    """PonderLM-3, with `fixed` (PonderLM-2) and `vanilla` as special cases.

    Attributes:
        model_config, ponder_config: what it was built from.
        eod_id: end-of-document token that confines attention and restarts positions; None for neither.
    """

    def __init__(
        self, model: ModelConfig, ponder: PonderConfig, mesh: Mesh | None = None, eod_id: int | None = None
    ) -> None:
        super().__init__()
        self.model_config, self.ponder_config, self.eod_id = model, ponder, eod_id
        axis = (mesh or Mesh()).tensor
        # With c = sqrt(2.5 H) this gives scaled embeddings unit RMS, as the latents have.
        std = model.init_std if ponder.mode == "vanilla" else math.sqrt(2 / (5 * model.hidden_size))
        self.embedding = VocabParallelEmbedding(model.vocab_size, model.hidden_size, axis, normal(std))
        self.transformer = Transformer(model, axis)
        self.router = Router(model, ponder, axis) if ponder.mode == "adaptive" else None
        self.head = ColumnParallelLinear(model.hidden_size, model.vocab_size, axis, normal(model.init_std))
        if model.tie_embeddings:
            self.head.weight = self.embedding.weight

    def pruning(self, hard: bool, threshold: float | None = None, bias: float | None = None) -> Pruning:
        """The rule for `jacobi` and `exact`, with the configured τ and α unless others are given."""
        config = self.ponder_config
        return Pruning(
            hard,
            config.threshold if threshold is None else threshold,
            config.router_bias if bias is None else bias,
        )

    def jacobi(
        self, tokens_BL: Tensor, refinements: int, pruning: Pruning, gradient_passes: int | None = None
    ) -> PonderOutput:
        """Evaluate all tokens in parallel by growth passes, `refinements` Jacobi passes and a final pass.

        Args:
            tokens_BL: int64 ids.
            refinements: R.
            pruning: soft mask or hard rule.
            gradient_passes: let gradients flow through the last so many passes only; None for all.
        """
        plan = pass_slots(self.ponder_config.steps, refinements)
        layout = interleaving(tokens_BL, self.eod_id)
        embedded = self.embed(tokens_BL)
        state = PassState()
        for index, slots in enumerate(plan):
            truncated = gradient_passes is not None and index < len(plan) - gradient_passes
            kept = kept_slots(index, plan, fused=self.router is not None)
            with torch.no_grad() if truncated else nullcontext():
                hidden, routing = self.run_pass(embedded, state, layout, pruning, kept)
                if index + 1 < len(plan):
                    state = self.next_state(hidden, routing, pruning, min(slots + 1, self.ponder_config.steps + 1))
        return PonderOutput(self.fuse(hidden, routing, pruning), hidden, routing, len(plan))

    @torch.no_grad()
    def exact(self, tokens_BL: Tensor, pruning: Pruning, tolerance: float | None = None) -> PonderOutput:
        """Iterate the Jacobi passes to their fixed point, which is the sequential model up to rounding.

        A position is right after at most as many passes as there are slots up to it; contraction makes it far fewer.

        Args:
            tokens_BL: int64 ids.
            pruning: soft mask or hard rule.
            tolerance: largest change of a latent, relative to the largest latent, at which to stop; 16 units of
                rounding unless given.
        """
        steps = self.ponder_config.steps
        layout = interleaving(tokens_BL, self.eod_id)
        embedded = self.embed(tokens_BL)
        tolerance = 16 * torch.finfo(embedded.dtype).eps if tolerance is None else tolerance
        state = PassState()
        for passes in range(1, tokens_BL.shape[1] * (steps + 1) + steps + 2):
            hidden, routing = self.run_pass(embedded, state, layout, pruning)
            following = self.next_state(hidden, routing, pruning, min(passes, steps) + 1)
            if steps == 0 or (passes > steps + 1 and _settled(state, following, tolerance)):
                break
            state = following
        return PonderOutput(self.fuse(hidden, routing, pruning), hidden, routing, passes)

    def embed(self, tokens: Tensor) -> Tensor:
        """e = c · E[x]: (...) ids → (..., H)."""
        return self.embedding(tokens) * self.ponder_config.embedding_scale

    def run_pass(
        self,
        embedded_BLH: Tensor,
        state: PassState,
        layout: Interleaving,
        pruning: Pruning,
        kept: slice = slice(None),
    ) -> tuple[Tensor, Routing | None]:
        """One pass over the interleaved sequence.

        Args:
            embedded_BLH: e of every token.
            state: what the pass before handed over.
            layout: positions and visibility.
            pruning: soft mask or hard rule.
            kept: the slots of every token whose hidden states are wanted; with a router, the first is one of them.

        Returns:
            Hidden states (B, L, kept slots, H), and the routing from those of the first slots.
        """
        x_BTH, log_w_BT = enter_pass(embedded_BLH, state)
        slots = x_BTH.shape[1] // embedded_BLH.shape[1]
        angles = layout.angles(slots, self.model_config, x_BTH.dtype)
        wanted = torch.arange(x_BTH.shape[1], device=x_BTH.device).view(-1, slots)[:, kept]
        every = wanted.shape[1] == slots
        h_BTH = self.transformer(x_BTH, angles, log_w_BT, layout.mask(slots), kept=None if every else wanted.flatten())
        hidden = h_BTH.unflatten(1, wanted.shape)
        return hidden, self.route(hidden[:, :, 0], pruning)

    def route(self, h_token: Tensor, pruning: Pruning) -> Routing | None:
        """The routing from h_{t,0} (..., H); None unless the mode is `adaptive`."""
        return None if self.router is None else route(self.router(h_token), pruning)

    def next_state(self, hidden_BLSH: Tensor, routing: Routing | None, pruning: Pruning, next_slots: int) -> PassState:
        """What the next pass starts from."""
        log_w = None if routing is None else key_log_weights(routing, pruning)
        return leave_pass(hidden_BLSH, log_w, next_slots)

    def fuse(self, hidden_BLSH: Tensor, routing: Routing | None, pruning: Pruning) -> Tensor:
        """The head's input: Σ_k s_k h_{t,k}, or h_{t,K} (which is h_{t,0} in vanilla mode) without a router."""
        if routing is None:
            return hidden_BLSH[:, :, -1]
        weights = fusion_weights(routing, pruning).to(hidden_BLSH.dtype)
        return (weights.unsqueeze(-2) @ hidden_BLSH).squeeze(-2)

    def run_slot(self, inputs_BH: Tensor, positions_B: Tensor, log_w_B: Tensor, caches: Sequence[LayerCache]) -> Tensor:
        """Run one slot of each sequence against its cached slots, as sequential decoding does.

        Args:
            inputs_BH: c · E[x] of a token slot or the hidden state of the slot before a latent one.
            positions_B: int64, the RoPE position of the slot's token.
            log_w_B: log weight of the slot as a key.
            caches: one for each layer.

        Returns:
            (B, H), the hidden state of the slot.
        """
        config = self.model_config
        rotated = int(config.head_size * config.rotary_fraction)
        angles = rotation(positions_B.unsqueeze(1), rotated, config.rope_theta, inputs_BH.dtype)
        return self.transformer(inputs_BH.unsqueeze(1), angles, log_w_B.unsqueeze(1), caches=caches).squeeze(1)


def _settled(before: PassState, after: PassState, tolerance: float) -> bool:
    change = (after.latents - before.latents).abs().amax()
    settled = bool(change <= tolerance * after.latents.abs().amax())
    if settled and before.log_w is not None:
        alive = (before.log_w > -1e3) == (after.log_w > -1e3)
        settled = bool(alive.all())
    return settled
