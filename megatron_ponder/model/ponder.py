"""The language model: embedding, transformer, router and head, and its parallel evaluations."""

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from megatron_ponder.config import InferenceConfig, ModelConfig, PonderConfig
from megatron_ponder.config.run import AttentionKernel
from megatron_ponder.kernels.attention import OwnSlots
from megatron_ponder.model.attention import LayerCache, Slots
from megatron_ponder.model.ends import Back, Front, Head, LatentScale
from megatron_ponder.model.exits import Exit
from megatron_ponder.model.fixed_point import settle
from megatron_ponder.model.geometry import Geometry
from megatron_ponder.model.modes import passes_of
from megatron_ponder.model.modes.pondering import PassResult, Sizes, State, Stream
from megatron_ponder.model.rope import rotation
from megatron_ponder.model.router import (
    Router,
    Routing,
    Rule,
    RuleKind,
    executed_before,
    fusion_weights,
    key_log_weights,
    route,
    rule_of,
)
from megatron_ponder.model.slotwise import run_slotwise
from megatron_ponder.model.spans import span
from megatron_ponder.model.transformer import ModelPart, Recompute, Transformer
from megatron_ponder.parallel.context import all_slots, equal_shares
from megatron_ponder.parallel.layers import VocabParallelEmbedding
from megatron_ponder.parallel.mesh import Mesh
from megatron_ponder.parallel.regions import all_tokens, enter
from megatron_ponder.parallel.sharding import normal

UNCHANGED = InferenceConfig()


@dataclass
class PonderOutput:
    """The result of a parallel evaluation.

    Attributes:
        output_BLH: what the head reads, on all tensor ranks: h_{t,0}, h_{t,K} or the fused ĥ_t, by mode.
        hidden_BLSH: hidden states of the final pass's slots, of the last slot alone where only that is the output; with
            sequence parallelism those of this rank's tokens.
        routing: the final pass's routing, or the steps before an exit; None where neither decides.
        slots_PB: int64, slots that each pass ran of each sequence.
        steps: the most latent steps that a token could take: K, or 0 under the rule `none`.
        once: pass k ran slot k of tokens alone, so that every slot was run once.
    """

    output_BLH: Tensor
    hidden_BLSH: Tensor
    routing: Routing | None
    slots_PB: Tensor
    steps: int
    once: bool = False

    @property
    def passes(self) -> int:
        """How many passes were run."""
        return len(self.slots_PB)


class Batch(NamedTuple):
    """What every pass reads of a batch.

    Attributes:
        geometry: positions and segments.
        embedded_BLH: e of every token; None where no pass reads it.
    """

    geometry: Geometry
    embedded_BLH: Tensor | None


class PonderLM(nn.Module):
    """PonderLM-3, with `fixed` (PonderLM-2) and `vanilla` as special cases, and the baselines.

    Attributes:
        model_config, ponder_config: what it was built from.
        inference: τ and α unless others are given.
        recompute: what the backward pass computes again.
        attention_kernel: as in `training.attention_kernel`; caches have their own.
        passes: those of its mode.
        eod_id: end-of-document token that confines attention and restarts positions; None for neither.
        part: which part of the model this pipeline rank holds; modules of other parts are None.
        axis: the tensor ranks.
        context: the ranks that share the tokens of every sequence; what is said of a sequence is said of their share.
    """

    def __init__(
        self,
        model: ModelConfig,
        ponder: PonderConfig,
        mesh: Mesh | None = None,
        eod_id: int | None = None,
        part: ModelPart | None = None,
        vocab_multiple: int = 1,
        inference: InferenceConfig = UNCHANGED,
        recompute: Recompute | None = None,
        attention_kernel: AttentionKernel = "auto",
    ) -> None:
        super().__init__()
        self.model_config, self.ponder_config, self.inference, self.eod_id = model, ponder, inference, eod_id
        self.recompute, self.attention_kernel = recompute or Recompute(), attention_kernel
        self.passes = passes_of(ponder)
        self.part = part = part or ModelPart(range(model.num_layers))
        mesh = mesh or Mesh()
        self.axis = axis = mesh.tensor
        self.context = mesh.context
        vocabulary = (model.vocab_size, model.hidden_size, axis)
        # With c = sqrt(2.5 H) this gives scaled embeddings unit RMS, as the latents have.
        std = model.init_std if ponder.mode == "vanilla" else math.sqrt(2 / (5 * model.hidden_size))
        self.embedding, self.latent_scale, self._learned = None, None, ()
        if part.first or (part.last and model.tie_embeddings):
            self.embedding = VocabParallelEmbedding(*vocabulary, normal(std), vocab_multiple)
        if part.first:
            self.latent_scale = LatentScale(ponder, axis)
            learned = self.passes.learned_inputs(model.hidden_size, axis, normal(std))
            self._learned = tuple(learned)
            for name, module in learned.items():
                self.add_module(name, module)
        self.transformer = Transformer(model, axis, part)
        self.router, self.head = None, None
        if part.last:
            self.router = Router(model, ponder, axis) if self.passes.routed else None
            self.head = Head(model, axis, vocab_multiple)
            if model.tie_embeddings:
                self.head.weight = self.embedding.weight

    @property
    def tied(self) -> nn.Parameter | None:
        """The embedding that is the head too and of which this part and another hold a copy each; None if none is."""
        shares = self.model_config.tie_embeddings and self.part.first != self.part.last
        return self.embedding.weight if shares else None

    @property
    def copied(self) -> nn.Parameter | None:
        """That of this part, where the other's counts: in the last part."""
        return self.tied if self.part.last else None

    @property
    def front(self) -> Front:
        """Where tokens enter, in the first part."""
        learned = {name: self.get_submodule(name) for name in self._learned}
        return Front(self.embedding, self.ponder_config.embedding_scale, self.latent_scale, learned)

    @property
    def back(self) -> Back:
        """Where tokens are predicted, in the last part."""
        return Back(self.head, self.axis, self.model_config.vocab_size)

    def rule(
        self, kind: RuleKind, threshold: float | None = None, bias: float | None = None, exit: Exit | None = None
    ) -> Rule:
        """A rule for `jacobi` and `exact`, with the configured τ and α unless others are given."""
        return rule_of(self.inference, kind, threshold, bias, exit)

    def jacobi(
        self, tokens_BL: Tensor, refinements: int, rule: Rule, gradient_passes: int | None = None
    ) -> PonderOutput:
        """Evaluate all tokens in parallel by growth passes, `refinements` Jacobi passes and a final pass.

        Where no other token sees latents, by passes of one slot a token (`Passes.runs_once`), which give the same.

        Args:
            tokens_BL: int64 ids.
            refinements: R.
            rule: how a routing is applied; without an exit, as slots beyond it would be run.
            gradient_passes: let gradients flow through the last so many passes only; None for all.
        """
        assert rule.exit is None
        if rule.latents and self.passes.runs_once(gradient_passes):
            return self.slotwise(tokens_BL, rule)
        return self.by_growth(tokens_BL, refinements, rule, gradient_passes)

    def by_growth(
        self, tokens_BL: Tensor, refinements: int, rule: Rule, gradient_passes: int | None = None
    ) -> PonderOutput:
        """Evaluate as `jacobi` does, by the passes that pipelines run in every mode.

        Args:
            tokens_BL: int64 ids.
            refinements, rule, gradient_passes: as of `jacobi`.
        """
        plan = self.passes.plan(refinements, rule.latents)
        batch = self.read(tokens_BL)
        state = None
        for index in range(len(plan)):
            truncated = gradient_passes is not None and index < len(plan) - gradient_passes
            with torch.no_grad() if truncated else nullcontext():
                result = self.run_pass(batch, state, rule, index, plan)
                if index + 1 < len(plan):
                    state = self.next_state(result, rule, plan[index + 1])
        return self.output(result, rule, plan)

    def slotwise(self, tokens_BL: Tensor, rule: Rule, packed: bool = False) -> PonderOutput:
        """Evaluate as `jacobi` does, by passes of one slot a token, for which `Passes.runs_once` holds.

        Args:
            tokens_BL: int64 ids.
            rule: how a routing is applied.
            packed: as in `run_slotwise`.
        """
        batch = self.read(tokens_BL)
        hidden_BLSH, routing, slots_PB = run_slotwise(self, *batch, rule, packed)
        fused, routing = self._on_all_ranks(hidden_BLSH, routing, routing, rule, batch.geometry.tokens)
        return PonderOutput(fused, hidden_BLSH, routing, slots_PB, self.ponder_config.steps, once=True)

    @torch.no_grad()
    def exact(self, tokens_BL: Tensor, rule: Rule, tolerance: float | None = None) -> PonderOutput:
        """Iterate to the fixed point, which is the sequential model up to rounding, by sweeps (`fixed_point.py`).

        Passes that are not iterated are the sequential model as they are.

        Args:
            tokens_BL: int64 ids.
            rule: how a routing is applied.
            tolerance: largest change of a hidden state, relative to the largest, at which to stop; 16 units of rounding
                unless given.

        Returns:
            The output; hidden states of slots that the rule prunes are zeros, and `slots_PB` is of sweeps.

        Raises:
            UserError: the rule has an exit, by which tokens of this mode cannot stop.
        """
        if rule.exit is not None:
            rule.exit.check(self.ponder_config)
        if not (self.passes.iterated and rule.latents):
            return self.jacobi(tokens_BL, 0, rule)
        batch = self.read(tokens_BL)
        tolerance = 16 * torch.finfo(batch.embedded_BLH.dtype).eps if tolerance is None else tolerance
        hidden_BLSH, routing, slots_PB = settle(self, *batch, rule, tolerance)
        return PonderOutput(
            self.fuse(hidden_BLSH, routing, rule), hidden_BLSH, routing, slots_PB, self.ponder_config.steps
        )

    def sizes(self, batch: int, tokens: int) -> Sizes:
        """Sizes of micro-batches of so many sequences of L tokens."""
        config = self.model_config
        return Sizes(batch, tokens, self.axis.share(tokens), config.hidden_size, config.vocab_size)

    def embed(self, tokens: Tensor) -> Tensor:
        """e = c · E[x] in the residual stream, of ids (...): (..., H)."""
        return self.front.embed(tokens)

    def read(self, tokens_BL: Tensor, embedded: bool = True, first: bool = True) -> Batch:
        """What passes read of a batch; without its embeddings where nobody wants them.

        Args:
            tokens_BL: ids.
            embedded: with embeddings.
            first: for the first pass. In a later one the factor on latents would be reached by two ways, of which
                PyTorch's zero-bubble schedules may count one twice.
        """
        e_BLH = self.embed(tokens_BL) if embedded else None
        if embedded and first and self.latent_scale.learned and torch.is_grad_enabled():
            e_BLH = e_BLH + 0 * self.latent_scale(e_BLH[..., :1])  # a step without latents gives it a gradient, of 0
        return Batch(Geometry.of(tokens_BL, self.eod_id, self.context), e_BLH)

    def run_pass(
        self,
        batch: Batch,
        state: State | None,
        rule: Rule,
        index: int = 0,
        plan: tuple[int, ...] = (),
    ) -> PassResult:
        """One pass of a whole model.

        Args:
            batch: with its embeddings.
            state: what the pass before handed over; None in the first.
            rule: how a routing is applied.
            index, plan: as in `run_blocks`.
        """
        stream = self.passes.enter(self.front, batch.embedded_BLH, state)
        return self.end_pass(self.run_blocks(stream, batch.geometry, index, plan), batch, rule)

    def run_blocks(self, stream: Stream, geometry: Geometry, index: int = 0, plan: tuple[int, ...] = ()) -> Stream:
        """What this part's blocks do in one pass.

        Args:
            stream: what enters them.
            geometry: positions and segments.
            index: of the pass.
            plan: slots per token of every pass, which tells which hidden states of this one anybody reads; empty if all
                are wanted.

        Returns:
            What leaves them; in the last part normed and of the kept slots alone.
        """
        x_BTH, log_w_BT, _ = stream
        slots_per_token = x_BTH.shape[1] // self.axis.share(geometry.tokens)
        kept = self.passes.kept(index, plan) if plan else slice(None)
        log_w_BT = None if log_w_BT is None else enter(log_w_BT, self.axis, geometry.tokens)
        shares = equal_shares(self.context, geometry.tokens * slots_per_token)
        own = OwnSlots(slots_per_token) if self.passes.own and slots_per_token > 1 else None
        slots = Slots(
            geometry.tokens,
            geometry.angles(slots_per_token, self.model_config, x_BTH.dtype),
            log_w_BT if log_w_BT is None or shares is None else all_slots(log_w_BT, shares),
            geometry.segments(slots_per_token if own is None else 1),
            slice(None) if kept == slice(0, slots_per_token) else kept,
            self.attention_kernel,
            shares=shares,
            own=own,
        )
        with span(f"pass {index}: {slots_per_token} slots a token"):
            return stream._replace(x_BTH=self.transformer(x_BTH, slots, recompute=self.recompute.of_pass(index)))

    def end_pass(self, stream: Stream, batch: Batch, rule: Rule) -> PassResult:
        """The result of a pass, from what leaves the last block; embeddings are wanted if the router reads them."""
        share = self.axis.share(batch.geometry.tokens)
        h_BLSH = stream.x_BTH.unflatten(1, (share, -1))
        read_BLH = batch.embedded_BLH if self.ponder_config.routes_by_token else h_BLSH[:, :, 0]
        ran_BL = None
        if rule.kind == "hard" and self.passes.routed:
            ran_BL = executed_before(stream.log_w_BT, h_BLSH.shape[:2], h_BLSH.device)
        return PassResult(h_BLSH, self.route(read_BLH, rule), stream.inputs_BTH, batch.geometry, ran_BL)

    def output(self, result: PassResult, rule: Rule, plan: Sequence[int]) -> PonderOutput:
        """What comes of the final pass.

        Args:
            result: of the pass.
            rule: how a routing is applied.
            plan: slots per token of every pass, this one the last.
        """
        hidden_BLSH, routing, _, geometry, ran_BL = result
        counted = routing if ran_BL is None else routing.at_most(ran_BL)
        fused, routing = self._on_all_ranks(hidden_BLSH, counted, routing, rule, geometry.tokens)
        slots_PB = torch.tensor(plan).unsqueeze(1).expand(-1, len(fused)) * geometry.tokens
        return PonderOutput(fused, hidden_BLSH, routing, slots_PB, self.ponder_config.steps if rule.latents else 0)

    def _on_all_ranks(
        self, hidden_BLSH: Tensor, counted: Routing | None, routing: Routing | None, rule: Rule, tokens: int
    ) -> tuple[Tensor, Routing | None]:
        """What the head reads, of hidden states and the steps of a routing that count, and a routing."""
        fused = enter(self.fuse(hidden_BLSH, counted, rule), self.axis, tokens)
        if routing is not None:
            routing = Routing(*(all_tokens(part, self.axis, tokens) for part in routing))
        return fused, routing

    def route(self, h_token: Tensor, rule: Rule) -> Routing | None:
        """The routing from what the router reads, (..., H); None unless the mode is `adaptive`."""
        if self.router is None:
            return None
        with span("router"):
            return route(self.router(h_token), rule)

    def next_state(self, result: PassResult, rule: Rule, next_slots: int) -> State:
        """What the next pass starts from."""
        routing = result.routing if result.ran_BL is None else result.routing.at_most(result.ran_BL + 1)
        log_w = None if routing is None else key_log_weights(routing, rule)
        return self.passes.leave(self.back, result, log_w, next_slots)

    def fuse(self, hidden_BLSH: Tensor, routing: Routing | None, rule: Rule) -> Tensor:
        """The head's input: Σ_k s_k h_{t,k} over the slots that were run; without a router, the last one's h."""
        if routing is None:
            return hidden_BLSH[:, :, -1]
        weights = fusion_weights(routing, rule)[..., : hidden_BLSH.shape[2]].to(hidden_BLSH.dtype)
        return (weights.unsqueeze(-2) @ hidden_BLSH).squeeze(-2)

    def run_slots(self, x_TH: Tensor, positions_T: Tensor, caches: Sequence[LayerCache]) -> Tensor:
        """Run slots of any sequences through this part's blocks, against the slots that their caches hold.

        Args:
            x_TH: the residual stream that enters: in the first part c · E[x] of a token slot, or the hidden state of
                the slot before a latent one.
            positions_T: int64, the RoPE position of each slot's token.
            caches: one for each block; they know which slot is of which sequence, and what it weighs as a key.

        Returns:
            (T, H), the residual stream that leaves; in the last part the hidden states of the slots.
        """
        angles = rotation(positions_T.unsqueeze(0), self.model_config, x_TH.dtype)
        return self.transformer(x_TH.unsqueeze(0), Slots(len(x_TH), angles), caches=caches).squeeze(0)
