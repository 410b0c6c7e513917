"""Runs forwards of generation through one rank's part of a model.

All that the host decides goes to the device before a forward, in one copy, and what the scheduler has to know comes
back after it, in one; between the two nothing waits, and no shape depends on a number that the device has computed.
"""

from itertools import islice
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from megatron_ponder.generation.block_cache import BlockCache
from megatron_ponder.generation.forward import Forward, Outcome, PromptSlots, Window
from megatron_ponder.generation.slot_numbers import SlotNumbers, bucket, upload
from megatron_ponder.model.modes.pondering import LatentReads
from megatron_ponder.model.ponder import PonderLM
from megatron_ponder.model.router import Rule, fusion_weights


class Arrived(NamedTuple):
    """What a forward is about, on the device.

    Attributes:
        slots: T of them.
        latents_n: int64, which are latent; None for none.
        unfinished_n: int64, after which a latent one may follow; None where nobody asks.
        routed_F: int64, which are routed: all R that decode, then tokens of prompts; None for all.
        rows_R: int64, the sequence that each decoding slot belongs to.
    """

    slots: SlotNumbers
    latents_n: Tensor | None
    unfinished_n: Tensor | None
    routed_F: Tensor | None
    rows_R: Tensor


class Routed(NamedTuple):
    """What is decided after F slots.

    Attributes:
        executed_F: int64, K̂, or K while no exit is taken.
        log_w_FK: log weights as keys.
        weights_FK: of the steps in the output; None where the last step is the output.
        logits_FV: by which exits are taken; None where they are not.
    """

    executed_F: Tensor
    log_w_FK: Tensor
    weights_FK: Tensor | None = None
    logits_FV: Tensor | None = None

    def first(self, count: int) -> "Routed":
        """The same of the first so many slots."""
        return Routed(*(None if part is None else part[:count] for part in self))


class Runner:
    """One rank's part of a model, with the slots that its sequences have stored there.

    Attributes:
        cache: keys and values of this rank's layers and heads.
        read_TX: what latent slots read of the forward before; where the stack of layers is spread over ranks, its last
            rank hands it to the first.
    """

    def __init__(self, model: PonderLM, rule: Rule, rows: int, blocks: int | None = None) -> None:
        """Start without any sequence.

        Args:
            model: in evaluation mode; this rank's part.
            rule: τ, α and the exit; they are applied by the hard rule, whatever its kind.
            rows: sequences that may be live.
            blocks: of the cache; as many as are needed unless given.
        """
        self.model, self._passes, self._lanes = model, model.passes, model.passes.lanes
        self._rule = Rule("hard", rule.threshold, rule.bias, exit=rule.exit)
        weight = next(model.parameters())
        config, self._steps = model.model_config, model.ponder_config.steps
        row_slots = config.max_position_embeddings * (self._steps + 1) // self._lanes
        windows = rows if self._passes.iterated else 0
        sizes = len(model.part.layers), model.axis, rows * self._lanes + windows, row_slots
        self.cache = BlockCache(config, *sizes, self._passes.routed, weight, blocks)
        wide = torch.promote_types(weight.dtype, torch.float32)
        # Of the forward before: hidden states in the last part, inputs in the first.
        self._hidden_TH = self._inputs_TH = self.read_TX = weight.new_empty(0, config.hidden_size)
        # By row of a prompt, hidden states of the places of its window.
        self._in_windows: dict[int, Tensor] = {}
        # Of the token that each row is at: weights of its steps in the output, the output so far, K̂. A row is of none.
        self._weights_rK = torch.zeros(rows + 1, self._steps + 1, dtype=wide, device=weight.device)
        self._fused_rH = weight.new_zeros(rows + 1, config.hidden_size)
        self._executed_r = [self._steps] * rows

    @torch.inference_mode()
    def run(self, forward: Forward, received_TH: Tensor | None = None) -> Tensor:
        """Run this part's layers.

        Args:
            forward: the slots.
            received_TH: the residual stream from the part before; None in the first part.

        Returns:
            The residual stream, (T, H); in the last part the hidden states. On a GPU, where prompts are read, with rows
            of no sequence up to the next of few sizes, so that few kinds of products and of allocations are made.
        """
        numbers = self.cache.prepare(forward)
        if numbers is None:
            return self._hidden_TH[:0]
        arrived = self._arrived = self._upload(forward, numbers)
        self.cache.place(arrived.slots, forward)
        x_TH = self._inputs(arrived) if self.model.part.first else received_TH
        return self.model.run_slots(x_TH, arrived.slots.positions, self.cache.layers)

    @torch.inference_mode()
    def finish(self, forward: Forward, hidden_TH: Tensor) -> Outcome:
        """Route, fuse and predict, in the last part.

        Args:
            forward: the slots.
            hidden_TH: their hidden states.

        Returns:
            What the scheduler needs to know; with tensor ranks, the same on all of them.
        """
        if not forward:
            return Outcome([], [], hidden_TH.new_empty(0, self.model.model_config.vocab_size), [])
        arrived = self._arrived
        after = (hidden_TH, arrived.slots.steps)
        routed = self.route(*(after if arrived.routed_F is None else (part[arrived.routed_F] for part in after)))
        decoded_RH = self.fuse(arrived, hidden_TH, routed) if forward.steps else hidden_TH[:0]
        read = [self._last_output(forward, prompt, hidden_TH, routed) for prompt in forward.prompts]
        changes = [
            self._changes(prompt.window, hidden_TH[prompt.at : prompt.at + prompt.count])
            for prompt in forward.prompts
            if prompt.window is not None
        ]
        self._hidden_TH = hidden_TH
        self.read_TX = self._passes.read_by_latents(self.model.back, hidden_TH, arrived.unfinished_n)
        slots = len(hidden_TH if arrived.routed_F is None else arrived.routed_F)
        known = known_of(routed, changes, slots, self._steps)
        read = [output for output in read if output is not None]
        return self._outcome(forward, known, decoded_RH, read, routed)

    def _upload(self, forward: Forward, numbers: SlotNumbers) -> Arrived:
        decoding = len(forward.steps)
        rows = numbers.rows[:decoding] // self._lanes
        latents = np.flatnonzero(numbers.steps)
        unfinished = np.flatnonzero(numbers.steps < self._steps) if self._passes.predicts else latents[:0]
        routed = [*range(decoding), *forward.routed[len(forward.deciding) :]] if forward.prompts else []
        if forward.prompts and self.cache.fixed:
            numbers = numbers.padded(bucket(len(forward)), self.cache.unused_slot)
        arrays = [np.stack(numbers), latents, unfinished, np.array(routed, np.int64), rows]
        slots, latents, unfinished, routed, rows = upload(arrays, self.read_TX.device)
        return Arrived(
            SlotNumbers(*slots.unbind()),
            latents if len(latents) else None,
            unfinished if self._passes.predicts else None,
            routed if forward.prompts else None,
            rows,
        )

    def _inputs(self, arrived: Arrived) -> Tensor:
        """The residual stream that enters the first part: embedded tokens and the inputs of latent slots."""
        slots, latents_n = arrived.slots, arrived.latents_n
        x_TH = self.model.embed(slots.tokens)
        if latents_n is not None:
            numbers = slots.sources[latents_n], slots.steps[latents_n]
            reads = LatentReads(self.read_TX, self._inputs_TH, *numbers)
            x_TH[latents_n] = self._passes.latent_inputs(self.model.front, reads)
        self._inputs_TH = x_TH
        return x_TH

    def route(self, hidden_FH: Tensor, steps_F: Tensor) -> Routed | None:
        """What is decided after slots, each with its latent step; None where all run and the last one is the output."""
        if self._rule.exit is not None:
            logits_FV = self.model.back.logits(hidden_FH)
            executed_F = torch.where(self._rule.exit.confident(logits_FV), steps_F, self._steps)
            return Routed(executed_F, logits_FV.new_zeros(len(steps_F), self._steps + 1), logits_FV=logits_FV)
        routing = self.model.route(hidden_FH, self._rule)
        if routing is None:
            return None
        return Routed(routing.executed, routing.log_w, fusion_weights(routing, self._rule))

    def fuse(self, arrived: Arrived, hidden_TH: Tensor, routed: Routed | None) -> Tensor:
        """Advance the outputs of the decoding sequences by their slots, (R, H); a first slot begins one."""
        if routed is None or routed.weights_FK is None:
            return hidden_TH[: len(arrived.rows_R)]
        rows_R = arrived.rows_R
        steps_R1 = arrived.slots.steps[: len(rows_R), None]
        weights_RK = torch.where(steps_R1 == 0, routed.weights_FK[: len(rows_R)], self._weights_rK[rows_R])
        self._weights_rK[rows_R] = weights_RK
        weights_R1 = weights_RK.gather(1, steps_R1).to(hidden_TH.dtype)
        fused_RH = self._fused_rH[rows_R].masked_fill_(steps_R1 == 0, 0).addcmul_(weights_R1, hidden_TH[: len(rows_R)])
        self._fused_rH[rows_R] = fused_RH
        return fused_RH

    def _last_output(
        self, forward: Forward, prompt: PromptSlots, hidden_TH: Tensor, routed: Routed | None
    ) -> Tensor | None:
        """What the head reads of the last token of a prompt, (1, H), from its slots; None where it is not wanted."""
        if prompt.last_token is None:
            return None
        token_SH = hidden_TH[prompt.last_token : prompt.at + prompt.count]
        if routed is None:
            return token_SH[-1:]
        index = len(forward.steps) - len(forward.deciding) + forward.routed.index(prompt.last_token)
        weights_K = routed.weights_FK[index].to(token_SH.dtype)
        return weights_K[: len(token_SH)].unsqueeze(0) @ token_SH

    def _changes(self, window: Window, now_SH: Tensor) -> Tensor:
        """Largest change of each slot's hidden state relative to the largest of all; what is there now is noted."""
        known_PH = self._in_windows.get(window.row)
        if known_PH is None or len(known_PH) < len(window.orders):
            known_PH = self._in_windows[window.row] = now_SH.new_zeros(len(window.orders), now_SH.shape[1])
        places_S = upload([np.array(window.places, np.int64)], now_SH.device)[0]
        changes_S = (now_SH - known_PH[places_S]).abs().amax(1) / now_SH.abs().max()
        known_PH[places_S] = now_SH
        return changes_S

    def _outcome(
        self, forward: Forward, known: "Known", decoded_RH: Tensor, read: list[Tensor], routed: Routed | None
    ) -> Outcome:
        """What the scheduler needs to know, with logits of the sequences that have completed their token."""
        rows = [segment.row // self._lanes for segment in forward.segments[: len(forward.steps)]]
        for index in forward.deciding:
            self._executed_r[rows[index]] = known.executed[index]
        completed = [
            index
            for index, (row, step, wanted) in enumerate(zip(rows, forward.steps, forward.wanted, strict=True))
            if wanted and step == self._executed_r[row]
        ]
        predicted = routed is not None and routed.logits_FV is not None  # then no prompt ends in a piece, and has read
        given = routed.logits_FV[: len(rows)] if predicted else decoded_RH
        if len(completed) < len(rows):
            given = given[upload([np.array(completed, np.int64)], given.device)[0]]
        decided = [*forward.deciding, *range(len(rows), len(known.executed))]
        changes = iter(known.changes)
        counts = [0 if prompt.window is None else prompt.count for prompt in forward.prompts]
        return Outcome(
            [known.executed[index] for index in decided],
            [known.log_w[index] for index in decided],
            given if predicted else self._logits(torch.cat([given, *read]) if read else given),
            [list(islice(changes, count)) for count in counts],
        )

    def _logits(self, output_nH: Tensor) -> Tensor:
        """(n, V), of no matter how few."""
        if not len(output_nH):
            return output_nH.new_empty(0, self.model.model_config.vocab_size)
        return self.model.back.logits(output_nH)


class Known(NamedTuple):
    """What the host has to know of a forward: K̂ and log weights of F slots, changes of slots in windows."""

    executed: list[int]
    log_w: list[list[float]]
    changes: list[float]


def known_of(routed: Routed | None, changes: list[Tensor], slots: int, steps: int) -> Known:
    """Brought to the host by one copy, for which it waits; without a router, K of as many slots as there are."""
    parts = [change.double() for change in changes]
    if routed is not None:
        parts += [routed.executed_F.double(), routed.log_w_FK.double().flatten()]
    numbers = iter(torch.cat(parts).tolist() if parts else [])
    changes = list(islice(numbers, sum(map(len, changes))))
    if routed is None:
        return Known([steps] * slots, [[0.0] * (steps + 1)] * slots, changes)
    executed = [int(number) for number in islice(numbers, len(routed.executed_F))]
    return Known(executed, [list(islice(numbers, steps + 1)) for _ in executed], changes)
