"""Pruned passes that run no slot which the hard rule leaves out, so that training pays for the slots that it keeps.

A pass runs slots 0 .. n of a token, n = 0 in the first. Of its own routing min(K̂, n) steps count where hidden states
are fused; the next pass runs min(K̂, n + 1), because z_{t,j+1} = h_{t,j} must have been run. The slots of all tokens of
a batch lie one behind the other, row by row, in segments that see no other. It equals `PonderLM.jacobi`, in which the
same slots are dead as keys, up to rounding and with all gradients.

With sequence parallelism ranks share slots, and not tokens, in the residual stream, so that their shares are equal;
hence what a pass hands to the next is gathered from all ranks.
"""

from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_ponder.kernels.segments import Segments
from megatron_ponder.model.attention import Slots
from megatron_ponder.model.ponder import Batch, PonderLM, PonderOutput
from megatron_ponder.model.rope import rotation
from megatron_ponder.model.router import Routing, Rule
from megatron_ponder.model.spans import span
from megatron_ponder.parallel.regions import all_tokens, enter, gather_parts, own_part


class Packing(NamedTuple):
    """Slots of N tokens, of each as many as it runs, one behind the other.

    Attributes:
        token_T: int64, the token of every slot.
        step_T: int64, its latent step.
        first_N: int64, where the slots of every token begin.
    """

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
        return cls(token_T, step_T, first_N)

    def places(self, of: "Packing") -> Tensor:
        """Where the slots of another packing stand among these, int64."""
        return self.first_N[of.token_T] + of.step_T

    def inputs(self, embedded_1NH: Tensor, before: "Packing", h_1TH: Tensor) -> Tensor:
        """What enters the blocks in every slot: the embedded token, or h of the slot before in the pass before."""
        tokens = len(self.first_N)
        latent_T = tokens + before.first_N[self.token_T] + self.step_T - 1
        sources_T = torch.where(self.step_T == 0, self.token_T, latent_T)
        return torch.cat([embedded_1NH, h_1TH], 1).index_select(1, sources_T)

    def dense(self, h_1TH: Tensor, slots: int) -> Tensor:
        """(1, T, H) → (1, N, slots, H), zeros where a slot was not run."""
        count, hidden = len(self.first_N), h_1TH.shape[-1]
        every = h_1TH.new_zeros(1, count * slots, hidden)
        return every.index_copy(1, self.token_T * slots + self.step_T, h_1TH).unflatten(1, (count, slots))


class _Pass(NamedTuple):
    """What a pass leaves behind: its slots that anybody reads, their hidden states, and the routing of all tokens."""

    packing: Packing
    h_1TH: Tensor
    log_w_1NK: Tensor
    executed_N: Tensor
    routing: Routing


def packable(model: PonderLM, rule: Rule) -> bool:
    """Whether `packed_jacobi` can evaluate a model by a rule; compiled blocks would want a graph each time."""
    known = rule.kind == "hard" and rule.executed is None and model.passes.routed
    return known and model.part.is_whole and model.transformer.compiled is None


def packed_jacobi(
    model: PonderLM, tokens_BL: Tensor, refinements: int, rule: Rule, gradient_passes: int | None = None
) -> PonderOutput:
    """Evaluate as `PonderLM.jacobi` does under the hard rule, without the slots that it leaves out.

    Args:
        model: for which, with the rule, `packable` holds.
        tokens_BL: int64 ids.
        refinements: R.
        rule: how a routing is applied.
        gradient_passes: let gradients flow through the last so many passes only; None for all.

    Returns:
        The same; hidden states of slots that were not run are zeros, and with sequence parallelism those that this rank
        has of all B · L tokens, (1, its tokens, K + 1, H).
    """
    plan, batch, axis, shape = model.passes.plan(refinements), model.read(tokens_BL), model.axis, tokens_BL.shape
    embedded_1NH = gather_parts(batch.embedded_BLH, axis, shape[1]).flatten(0, 1).unsqueeze(0)
    ran_N, slots_PB, done = tokens_BL.new_zeros(tokens_BL.numel()), [], None
    for index, slots in enumerate(plan):
        following = plan[index + 1] if index + 1 < len(plan) else None
        truncated = gradient_passes is not None and index < len(plan) - gradient_passes
        with torch.no_grad() if truncated else nullcontext():
            slots_PB.append((ran_N + 1).view(shape).sum(1))
            packing = Packing.of(ran_N)
            # The next pass reads no slot beyond its own last but one; the last block need not finish the others.
            drops = following == slots and not axis.sequence_parallel
            kept = Packing.of(ran_N.clamp(max=slots - 2)) if drops else packing
            done = _run(model, batch, index, embedded_1NH, done, packing, kept, slots, rule)
        if following is not None:
            ran_N = torch.minimum(done.executed_N, ran_N + 1).clamp(max=following - 1)
    hidden = own_part(done.packing.dense(done.h_1TH, plan[-1]), axis)
    counted = done.routing.at_most(own_part(ran_N.unsqueeze(0), axis))
    fused_1NH = enter(model.fuse(hidden, counted, rule), axis, len(ran_N))
    whole = Routing(*(all_tokens(part, axis, len(ran_N)).view(*shape, *part.shape[2:]) for part in done.routing))
    hidden = hidden if axis.sequence_parallel else hidden.view(*shape, *hidden.shape[2:])
    return PonderOutput(fused_1NH.view(*shape, -1), hidden, whole, torch.stack(slots_PB), plan[-1] - 1)


def _run(
    model: PonderLM,
    batch: Batch,
    index: int,
    embedded_1NH: Tensor,
    before: _Pass | None,
    packing: Packing,
    kept: Packing,
    most: int,
    rule: Rule,
) -> _Pass:
    """Run one pass.

    Args:
        model, batch, rule: as in `packed_jacobi`.
        index: of the pass.
        embedded_1NH: e of all tokens on every tensor rank.
        before: what the pass before left behind; None in the first.
        packing: the slots that it runs.
        kept: those whose hidden states are wanted.
        most: slots of a token that none has more of.
    """
    axis, tokens = model.axis, embedded_1NH.shape[1]
    x_1TH = embedded_1NH if before is None else packing.inputs(embedded_1NH, before.packing, before.h_1TH)
    log_w_1T = None if before is None else before.log_w_1NK[:, packing.token_T, packing.step_T]
    slots = _slots(model, batch, packing, log_w_1T, most)
    if kept is not packing:
        slots = slots._replace(kept=packing.places(kept))
    with span(f"pass {index}: slots that are kept"):
        h_1TH = model.transformer(own_part(x_1TH, axis), slots, recompute=model.recompute.of_pass(index))
    h_1TH = gather_parts(h_1TH, axis, len(kept.token_T))
    read_1NH = embedded_1NH if model.ponder_config.routes_by_token else h_1TH[:, kept.first_N]
    routing = model.route(own_part(read_1NH, axis), rule)
    log_w_1NK, executed_1N = enter(routing.log_w, axis, tokens), all_tokens(routing.executed, axis, tokens)
    return _Pass(kept, h_1TH, log_w_1NK, executed_1N.squeeze(0), routing)


def _slots(model: PonderLM, batch: Batch, packing: Packing, log_w_1T: Tensor | None, most: int) -> Slots:
    """What the slots of a pass are, for its blocks."""
    config, geometry, total = model.model_config, batch.geometry, len(packing.token_T)
    rows = len(batch.embedded_BLH)
    positions_N = geometry.positions_BL.expand(rows, -1).flatten()
    positions_1T, dtype = positions_N[packing.token_T].unsqueeze(0), batch.embedded_BLH.dtype
    angles = rotation(positions_1T, config.rotated_channels, config.rope_theta, dtype)
    segments = _segments(batch, packing, rows, most)
    return Slots(total, angles, log_w_1T, segments, kernel=model.attention_kernel)


def _segments(batch: Batch, packing: Packing, rows: int, most: int) -> Segments:
    """Which slots see each other."""
    tokens, device, total = batch.geometry.tokens, packing.token_T.device, len(packing.token_T)
    of_tokens = batch.geometry.segments(1)
    bounds = torch.arange(0, rows * tokens + 1, tokens, device=device) if of_tokens is None else of_tokens.bounds
    ends = torch.cat([packing.first_N, packing.first_N.new_full((1,), total)])
    return Segments.of(ends[bounds.long()], total, tokens * most)
