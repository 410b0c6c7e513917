"""Passes of which each runs one slot a token, so that every slot is run once, where no other token sees latents.

The first slots of tokens see no latent, and z_{t,k} = scale · h_{t,k-1} depends on first slots and on its own token's
alone. So what the growth passes of `passes.py` compute again and again never changes, and pass k has slot k alone to
run, given the keys and values of the passes before it: K + 1 slots a token in place of (K + 1)(K + 2) / 2. Values and
gradients are those of the growth passes up to rounding. The routing of the first pass is final; under the hard rule
tokens that it gives fewer than k steps need not be in pass k.

Where blocks are spread over pipeline ranks the growth passes run, which need no keys but their own.
"""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from megatron_ponder.config import ModelConfig, PonderConfig
from megatron_ponder.config.run import AttentionKernel
from megatron_ponder.model.attention import KeysAndValues, Slots, StepSlots
from megatron_ponder.model.ends import Front
from megatron_ponder.model.geometry import Geometry
from megatron_ponder.model.rope import rotation
from megatron_ponder.model.router import Routing, Rule, key_log_weights
from megatron_ponder.model.spans import span
from megatron_ponder.model.transformer import Recompute, Transformer
from megatron_ponder.parallel.collectives import least_of_ranks
from megatron_ponder.parallel.context import all_slots, equal_shares
from megatron_ponder.parallel.mesh import Axis
from megatron_ponder.parallel.regions import all_tokens, enter, gather_parts, own_part


class RunsSteps(Protocol):
    """What is asked of a model, which a whole `PonderLM` has.

    Attributes:
        model_config, ponder_config: what it was built from.
        transformer: all of its blocks.
        front: where latents enter.
        recompute: what the backward pass computes again.
        attention_kernel: as in `training.attention_kernel`.
        axis, context: the tensor ranks, and those that share tokens.
    """

    model_config: ModelConfig
    ponder_config: PonderConfig
    transformer: Transformer
    recompute: Recompute
    attention_kernel: AttentionKernel
    axis: Axis
    context: Axis

    @property
    def front(self) -> Front: ...

    def route(self, h_token: Tensor, rule: Rule) -> Routing | None:
        """The routing from what the router reads, (..., H)."""


class SlotsOnce(NamedTuple):
    """What passes of one slot a token have given.

    Attributes:
        hidden_BLSH: hidden states of this rank's tokens: of all slots where a router weighs them, zeros of those that
            were not run; else of the last one alone.
        routing: of this rank's tokens; None without a router.
        slots_PB: int64, slots that each pass ran of each sequence.
    """

    hidden_BLSH: Tensor
    routing: Routing | None
    slots_PB: Tensor


def run_slotwise(
    model: RunsSteps, geometry: Geometry, embedded_BLH: Tensor, rule: Rule, packed: bool = False
) -> SlotsOnce:
    """Run the slots 0 .. K of all tokens, one after another.

    Args:
        model: whole, with latents that no other token sees.
        geometry: positions and segments.
        embedded_BLH: e of every token.
        rule: how a routing is applied.
        packed: do not run the slots that the hard rule prunes, in place of masking them; the model has a router.
    """
    axis, tokens, rows = model.axis, geometry.tokens, len(embedded_BLH)
    passes = _SlotPasses(model, geometry, rows)
    h_BLH = passes.run(embedded_BLH)
    slots = [torch.full((rows,), tokens, device=h_BLH.device)]
    routing = model.route(embedded_BLH if model.ponder_config.routes_by_token else h_BLH, rule)
    if packed:
        # All tensor ranks must run the same slots, even where one of them has numbers that are none.
        executed_BL = least_of_ranks(all_tokens(routing.executed, axis, tokens), axis)
        routing = routing._replace(executed=own_part(executed_BL, axis))
        h_BLH = gather_parts(h_BLH, axis, tokens)
    if routing is not None:
        passes.weigh(key_log_weights(routing, rule)[..., 1:])
    hidden = [own_part(h_BLH, axis) if packed else h_BLH]
    for step in range(1, model.ponder_config.steps + 1):
        if packed:
            runs_BL, places = _running(executed_BL, step, 2 * axis.size)
            z_1TH = model.front.latent_scale(own_part(_taken(h_BLH, places), axis))
            h_BLH = _placed(gather_parts(passes.run(z_1TH, places), axis, len(places)), places, h_BLH)
            slots.append(runs_BL.sum(1))
        else:
            h_BLH = passes.run(model.front.latent_scale(h_BLH))
            slots.append(slots[0])
        hidden = [*(hidden if routing is not None else ()), own_part(h_BLH, axis) if packed else h_BLH]
    return SlotsOnce(torch.stack(hidden, 2), routing, torch.stack(slots))


class _SlotPasses:
    """The passes of a batch, of which each goes on from the keys and values of those before it."""

    def __init__(self, model: RunsSteps, geometry: Geometry, rows: int) -> None:
        self._model, self._geometry, self._rows = model, geometry, rows
        self._made: list[tuple[KeysAndValues, ...]] = [()] * len(model.transformer.blocks)
        self._log_w_BLK = None

    def weigh(self, log_w_BLK: Tensor) -> None:
        """Give the latent steps log weights as keys, (this rank's B, L, K)."""
        tokens, steps = self._geometry.tokens, log_w_BLK.shape[2]
        log_w_BLK = enter(log_w_BLK, self._model.axis, tokens)
        shares = equal_shares(self._model.context, tokens * steps)
        if shares is not None:
            log_w_BLK = all_slots(log_w_BLK.flatten(1, 2), shares).unflatten(1, (-1, steps))
        self._log_w_BLK = log_w_BLK

    def run(self, x_BTH: Tensor, places: Tensor | None = None) -> Tensor:
        """The next pass.

        Args:
            x_BTH: what enters the blocks, this rank's part of the tokens that run.
            places: int64, which of the B · L tokens run, so that T of them are one row; None if all do, T = L.

        Returns:
            Hidden states in the same shape.
        """
        model, geometry, index = self._model, self._geometry, len(self._made[0])
        log_w_BLK = None if self._log_w_BLK is None or index == 0 else self._log_w_BLK[..., :index]
        if places is None:
            tokens, step = geometry.tokens, StepSlots(log_w_BLK=log_w_BLK)
            angles = geometry.angles(1, model.model_config, x_BTH.dtype)
        else:
            tokens, step = len(places), StepSlots((), log_w_BLK, places, self._rows, geometry.tokens)
            positions_1T = geometry.positions_BL.expand(self._rows, -1).flatten()[places].unsqueeze(0)
            angles = rotation(positions_1T, model.model_config, x_BTH.dtype)
        slots = Slots(
            tokens,
            angles,
            segments=geometry.segments(1),
            kernel=model.attention_kernel,
            packed=places is not None,
            shares=equal_shares(model.context, geometry.tokens),
            step=step,
        )
        with span(f"pass {index}: 1 slot a token"):
            recompute = model.recompute.of_pass(index)
            h_BTH, self._made = model.transformer(x_BTH, slots, recompute=recompute, earlier=self._made)
        return h_BTH


def _running(executed_BL: Tensor, step: int, least: int) -> tuple[Tensor, Tensor]:
    """Which tokens run a step, as bool (B, L) and as int64 places; on a GPU the host waits for their number.

    If hardly any does, the first ones run with them, dead as keys: of no slot or a single one a compiler makes graphs
    of their own.
    """
    runs_BL = executed_BL >= step
    places = runs_BL.flatten().nonzero().squeeze(1)
    if len(places) < least:
        runs_BL.view(-1)[:least] = True
        places = runs_BL.flatten().nonzero().squeeze(1)
    return runs_BL, places


def _taken(h_BLH: Tensor, places: Tensor) -> Tensor:
    """Those of some tokens, (1, T, H)."""
    return h_BLH.flatten(0, 1).index_select(0, places).unsqueeze(0)


def _placed(h_1TH: Tensor, places: Tensor, like_BLH: Tensor) -> Tensor:
    """Back to (B, L, H), zeros where a token did not run."""
    return torch.zeros_like(like_BLH).flatten(0, 1).index_copy(0, places, h_1TH.squeeze(0)).view(like_BLH.shape)
