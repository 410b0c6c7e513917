"""Pruned passes that run no slot which the hard rule leaves out, so that training pays for the slots that it keeps.

A pass runs slots 0 .. n of a token, n = 0 in the first. Of its own routing min(K̂, n) steps count where hidden states
are fused; the next pass runs min(K̂, n + 1), because z_{t,j+1} = h_{t,j} must have been run. The slots of all tokens of
a batch lie one behind the other, row by row, in segments that see no other. It equals `PonderLM.jacobi`, in which the
same slots are dead as keys, up to rounding and with all gradients.

With sequence parallelism ranks share slots, and not tokens, in the residual stream, so that their shares are equal;
hence what a pass hands to the next is gathered from all ranks. Context ranks share tokens, and have unequal numbers of
slots, of which their all-to-all sends unequal parts. `packed_stages.py` spreads passes over pipeline ranks.
"""

from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_ponder.kernels.attention import OwnSlots
from megatron_ponder.kernels.segments import Segments
from megatron_ponder.model.attention import Slots
from megatron_ponder.model.ponder import Batch, PonderLM, PonderOutput
from megatron_ponder.model.rope import rotation
from megatron_ponder.model.router import Routing, Rule, key_log_weights
from megatron_ponder.model.spans import span
from megatron_ponder.parallel.collectives import least_of_ranks
from megatron_ponder.parallel.context import SlotShares, all_slots, whole_rows
from megatron_ponder.parallel.mesh import Axis
from megatron_ponder.parallel.regions import all_tokens, enter, gather_parts, own_part


class Packing(NamedTuple):
    """Slots of N tokens, of each as many as it runs, one behind the other.

    Attributes:
        ran_N: int64, latent steps of every token.
        token_T: int64, the token of every slot.
        step_T: int64, its latent step.
        first_N: int64, where the slots of every token begin.
    """

    ran_N: Tensor
    token_T: Tensor
    step_T: Tensor
    first_N: Tensor

    @classmethod
    def of(cls, ran_N: Tensor) -> "Packing":
        """The slots of tokens that run so many latent steps each; on a GPU the host waits for their number."""
        count_N = ran_N + 1
        first_N = count_N.cumsum(0) - count_N
        token_T = torch.arange(len(ran_N), device=ran_N.device).repeat_interleave(count_N)
        step_T = torch.arange(len(token_T), device=ran_N.device) - first_N[token_T]
        return cls(ran_N, token_T, step_T, first_N)

    def places(self, of: "Packing") -> Tensor:
        """Where the slots of another packing stand among these, int64."""
        return self.first_N[of.token_T] + of.step_T

    def sources(self, following: "Packing") -> Tensor:
        """Where the slots stand that give the Z latents of another packing, each the slot before it, int64 (Z,)."""
        tokens, device = len(self.ran_N), self.ran_N.device
        latents = len(following.token_T) - tokens
        token_N = torch.arange(tokens, device=device)
        token_Z = token_N.repeat_interleave(following.ran_N, output_size=latents)
        first_N = following.first_N - token_N  # where the latents of every token begin
        return self.first_N[token_Z] + torch.arange(latents, device=device) - first_N[token_Z]

    def inputs(self, embedded_1NH: Tensor, latents_1ZH: Tensor) -> Tensor:
        """What enters the blocks in every slot: the tokens, each with its latents behind it."""
        latent_T = len(self.ran_N) + torch.arange(len(self.token_T), device=self.token_T.device) - self.token_T - 1
        sources_T = torch.where(self.step_T == 0, self.token_T, latent_T)
        return torch.cat([embedded_1NH, latents_1ZH], 1).index_select(1, sources_T)

    def dense(self, h_1TH: Tensor, slots: int) -> Tensor:
        """(1, T, H) → (1, N, slots, H), zeros where a slot was not run."""
        count, hidden = len(self.first_N), h_1TH.shape[-1]
        every = h_1TH.new_zeros(1, count * slots, hidden)
        return every.index_copy(1, self.token_T * slots + self.step_T, h_1TH).unflatten(1, (count, slots))


class PackedState(NamedTuple):
    """What one pass hands to the next.

    Attributes:
        packing: the slots that the next pass runs.
        slots_PB: int64, slots that the passes before it ran of each sequence.
        log_w_1NS: log weights of its slots as keys, of this rank's tokens; what is not run is dead. None for the first.
        latents_1ZH: the hidden states that z of all slots but the tokens' first are made of, on all tensor ranks; None
            for the first.
    """

    packing: Packing
    slots_PB: Tensor
    log_w_1NS: Tensor | None = None
    latents_1ZH: Tensor | None = None


class PackedStream(NamedTuple):
    """What goes through the blocks of a pass.

    Attributes:
        packing, slots_PB, log_w_1NS: as in `PackedState`.
        x_1TH: the residual stream, this rank's part of the slots; behind the last block, of those that are kept.
    """

    packing: Packing
    slots_PB: Tensor
    log_w_1NS: Tensor | None
    x_1TH: Tensor


class PackedResult(NamedTuple):
    """What a pass gave.

    Attributes:
        packing, slots_PB: as in `PackedState`, of this pass.
        kept: those of its slots that anybody reads.
        h_1TH: their hidden states, on all tensor ranks.
        routing: of this rank's tokens.
    """

    packing: Packing
    slots_PB: Tensor
    kept: Packing
    h_1TH: Tensor
    routing: Routing


def packable(model: PonderLM, rule: Rule) -> bool:
    """Whether `PackedPasses` can evaluate a model by a rule."""
    return rule.kind == "hard" and rule.executed is None and model.passes.routed


def packed_jacobi(
    model: PonderLM, tokens_BL: Tensor, refinements: int, rule: Rule, gradient_passes: int | None = None
) -> PonderOutput:
    """Evaluate as `PonderLM.jacobi` does under the hard rule, without the slots that it leaves out.

    Args:
        model: whole, for which, with the rule, `packable` holds.
        tokens_BL: int64 ids.
        refinements: R.
        rule: how a routing is applied.
        gradient_passes: let gradients flow through the last so many passes only; None for all.

    Returns:
        The same; hidden states of slots that were not run are zeros, and with sequence parallelism those that this rank
        has of all B · L tokens, (1, its tokens, K + 1, H), unless every slot was run once.
    """
    if model.passes.runs_once(gradient_passes):
        return model.slotwise(tokens_BL, rule, packed=True)
    plan, batch, state = model.passes.plan(refinements), model.read(tokens_BL), start(tokens_BL)
    passes = PackedPasses(model, rule, plan)
    embedded_1NH = passes.embedded(batch)
    for index in range(len(plan)):
        truncated = gradient_passes is not None and index < len(plan) - gradient_passes
        with torch.no_grad() if truncated else nullcontext():
            result = passes.end(*passes.run(passes.enter(embedded_1NH, state), batch, index), embedded_1NH)
            if index + 1 < len(plan):
                state = passes.hand_over(result, index)
    return passes.output(result)


def start(tokens_BL: Tensor) -> PackedState:
    """What the first pass starts from: the tokens alone."""
    return PackedState(Packing.of(torch.zeros_like(tokens_BL.flatten())), tokens_BL.new_zeros(0, len(tokens_BL)))


class PackedPasses:
    """The passes of a model, or of the part of one that this pipeline rank holds.

    Attributes:
        model: the model or its part.
        rule: how a routing is applied.
        plan: slots per token of every pass that none has more of.
    """

    def __init__(self, model: PonderLM, rule: Rule, plan: tuple[int, ...]) -> None:
        self.model, self.rule, self.plan = model, rule, plan

    def embedded(self, batch: Batch) -> Tensor:
        """e of all N tokens, (1, N, H), on all tensor ranks."""
        return gather_parts(batch.embedded_BLH, self.model.axis, batch.geometry.tokens).flatten(0, 1).unsqueeze(0)

    def enter(self, embedded_1NH: Tensor, state: PackedState) -> PackedStream:
        """What enters the blocks, in the first part."""
        packing, slots_PB, log_w_1NS, latents_1ZH = state
        x_1TH = embedded_1NH
        if latents_1ZH is not None:
            x_1TH = packing.inputs(embedded_1NH, self.model.front.latent_scale(latents_1ZH))
        return PackedStream(packing, slots_PB, log_w_1NS, own_part(x_1TH, self.model.axis))

    def run(self, stream: PackedStream, batch: Batch, index: int) -> tuple[PackedStream, Packing]:
        """What leaves this part's blocks in one pass.

        Args:
            stream: what enters them.
            batch: positions and segments.
            index: of the pass.

        Returns:
            What leaves them, and the slots that it is of.
        """
        model, packing = self.model, stream.packing
        slots, kept = self._slots(stream, batch, index), self._kept(packing, index)
        if kept is not packing:
            slots = slots._replace(kept=packing.places(kept))
        with span(f"pass {index}: slots that are kept"):
            x_1TH = model.transformer(stream.x_1TH, slots, recompute=model.recompute.of_pass(index))
        return stream._replace(x_1TH=x_1TH), kept

    def end(self, stream: PackedStream, kept: Packing, embedded_1NH: Tensor | None = None) -> PackedResult:
        """The result of a pass, in the last part.

        Args:
            stream, kept: what `run` gave.
            embedded_1NH: e of all tokens, if the router reads them.
        """
        model, packing = self.model, stream.packing
        h_1TH = gather_parts(stream.x_1TH, model.axis, len(kept.token_T))
        read_1NH = embedded_1NH if model.ponder_config.routes_by_token else h_1TH[:, kept.first_N]
        routing = model.route(own_part(read_1NH, model.axis), self.rule)
        own_B = (packing.ran_N + 1).view(stream.slots_PB.shape[1], -1).sum(1)
        return PackedResult(packing, torch.cat([stream.slots_PB, own_B.unsqueeze(0)]), kept, h_1TH, routing)

    def hand_over(self, result: PackedResult, index: int) -> PackedState:
        """What pass `index` hands to the next, in the last part."""
        packing, slots_PB, kept, h_1TH, routing = result
        axis, slots = self.model.axis, self.plan[index + 1]
        # All tensor ranks must run the same slots, even where one of them has numbers that are none.
        executed_N = least_of_ranks(all_tokens(routing.executed, axis, len(packing.ran_N)), axis).squeeze(0)
        following = Packing.of(torch.minimum(executed_N, packing.ran_N + 1).clamp(max=slots - 1))
        pruned = routing._replace(executed=own_part(following.ran_N.unsqueeze(0), axis))
        log_w_1NS = key_log_weights(pruned, self.rule)[..., :slots]
        return PackedState(following, slots_PB, log_w_1NS, h_1TH.index_select(1, kept.sources(following)))

    def output(self, result: PackedResult) -> PonderOutput:
        """What comes of the final pass, in the last part."""
        packing, slots_PB, kept, h_1TH, routing = result
        model, axis, tokens, rows = self.model, self.model.axis, len(packing.ran_N), slots_PB.shape[1]
        hidden = own_part(kept.dense(h_1TH, self.plan[-1]), axis)
        counted = routing.at_most(own_part(packing.ran_N.unsqueeze(0), axis))
        fused_1NH = enter(model.fuse(hidden, counted, self.rule), axis, tokens)
        parts = (all_tokens(part, axis, tokens) for part in routing)
        whole = Routing(*(part.view(rows, -1, *part.shape[2:]) for part in parts))
        hidden = hidden if axis.sequence_parallel else hidden.view(rows, -1, *hidden.shape[2:])
        return PonderOutput(fused_1NH.view(rows, -1, fused_1NH.shape[-1]), hidden, whole, slots_PB, self.plan[-1] - 1)

    def _kept(self, packing: Packing, index: int) -> Packing:
        """The slots of a pass that the last block of all has to finish.

        The next pass reads no slot beyond its own last but one.
        """
        model, slots = self.model, self.plan[index]
        again = index + 1 < len(self.plan) and self.plan[index + 1] == slots
        drops = again and model.part.last and not model.axis.sequence_parallel
        return Packing.of(packing.ran_N.clamp(max=slots - 2)) if drops else packing

    def _slots(self, stream: PackedStream, batch: Batch, index: int) -> Slots:
        """What the slots of a pass are, for its blocks."""
        model, (packing, _, log_w_1NS, x_1TH) = self.model, stream
        geometry, log_w_1T = batch.geometry, None
        if log_w_1NS is not None:
            log_w_1T = enter(log_w_1NS, model.axis, len(packing.ran_N))[:, packing.token_T, packing.step_T]
        rows = len(packing.ran_N) // geometry.tokens
        positions_1T = geometry.positions_BL.expand(rows, -1).flatten()[packing.token_T].unsqueeze(0)
        angles = rotation(positions_1T, model.model_config, x_1TH.dtype)
        whole, shares = packing, None
        if model.context.size > 1:
            whole, shares = _of_all_shares(packing, rows, model.context)
            log_w_1T = None if log_w_1T is None else all_slots(log_w_1T, shares)
        tokens, own = geometry.tokens * model.context.size, None
        if model.passes.own and index > 0:
            slots = self.plan[index]
            own = OwnSlots(slots, whole.token_T * slots + whole.step_T, rows, rows * tokens)
            segments = geometry.segments(1)
        else:
            segments = _segments(geometry.segments(1), whole, rows, tokens, tokens * self.plan[index])
        return Slots(
            len(packing.token_T),
            angles,
            log_w_1T,
            segments,
            kernel=model.attention_kernel,
            packed=True,
            shares=shares,
            own=own,
        )


def _of_all_shares(packing: Packing, rows: int, context: Axis) -> tuple[Packing, SlotShares]:
    """The slots of whole sequences, and which of them context ranks have; on a GPU the host waits for their numbers.

    Ranks hold unequal numbers of slots, since each prunes those of its own tokens.
    """
    ran_BL = whole_rows(packing.ran_N.view(rows, -1), context)
    counts_nBL = (ran_BL + 1).unflatten(1, (context.size, -1)).movedim(1, 0)
    whole = Packing.of(ran_BL.flatten())
    order = back = None
    if rows > 1:  # ranks send the slots of their shares of all rows one behind the other
        first_nBL = (counts_nBL.flatten().cumsum(0) - counts_nBL.flatten()).view(counts_nBL.shape)
        order = first_nBL.movedim(0, 1).flatten()[whole.token_T] + whole.step_T
        back = order.argsort()
    return whole, SlotShares(context, tuple(counts_nBL.sum((1, 2)).tolist()), order, back)


def _segments(of_tokens: Segments | None, packing: Packing, rows: int, tokens: int, longest: int) -> Segments:
    """Which slots of rows of so many tokens see each other."""
    device, total = packing.token_T.device, len(packing.token_T)
    bounds = torch.arange(0, rows * tokens + 1, tokens, device=device) if of_tokens is None else of_tokens.bounds
    ends = torch.cat([packing.first_N, packing.first_N.new_full((1,), total)])
    return Segments.of(ends[bounds.long()], total, longest)
