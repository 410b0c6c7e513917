"""Slot-level continuous batching: every forward runs, of every live sequence, the one slot that it needs next.

The router decides a token's steps at its first slot, so that sequences never wait for each other: one runs step 2 of
its fifth token while its neighbour runs the first slot of its ninth, and a third reads its prompt by Jacobi iteration.
Sequences leave and enter between forwards.
"""

import time
import traceback
from collections import deque

import numpy as np
import torch

from megatron_ponder.base.counts import counted
from megatron_ponder.base.errors import UserError
from megatron_ponder.config import ModelConfig, PonderConfig
from megatron_ponder.data.tokenizer import Tokenizer
from megatron_ponder.generation.far_choices import Wishes
from megatron_ponder.generation.forward import Finished, Forward, Outcome, Segment, latent
from megatron_ponder.generation.predictions import Prediction, pieces_of, predict
from megatron_ponder.generation.prefixes import Prefixes, shared_tokens
from megatron_ponder.generation.prompt_reading import PromptReading
from megatron_ponder.generation.request import FinishReason, Generation, Request
from megatron_ponder.generation.sampling import Chooser
from megatron_ponder.generation.sequences import Batching, OnToken, Sequence, Usage
from megatron_ponder.generation.text_stream import TextStream
from megatron_ponder.model.modes import passes_of

NOT_FINITE = "the model's logits are not finite after these tokens; look whether its weights are, or try fp32"


class Scheduler:
    """Turns requests into forwards, and their outcomes into tokens. It touches neither model nor cache.

    Attributes:
        usage: counts.
        live: sequences with slots in the cache, the oldest first.
        waiting: sequences without, the next one first.
    """

    def __init__(
        self,
        model: ModelConfig,
        ponder: PonderConfig,
        batching: Batching | None = None,
        tokenizer: Tokenizer | None = None,
        eod_id: int | None = None,
        dtype: torch.dtype = torch.float32,
        chooses: bool = True,
        exits: bool = False,
    ) -> None:
        """Start without requests.

        Args:
            model, ponder: configuration of the model.
            batching: limits.
            tokenizer: for text and stop strings.
            eod_id: the token after which the model begins anew, if documents are kept apart.
            dtype: of the model, which decides when a fixed point is reached.
            chooses: tokens itself, by logits; else the last rank of a pipeline does, which is told what it has to know.
            exits: each slot may be the last of its token, which is known after it; else that is after the first.
        """
        self._model, self._steps, self._passes = model, ponder.steps, passes_of(ponder)
        self.batching = batching or Batching()
        self._tokenizer, self._eod_id = tokenizer, eod_id
        self._pieces = pieces_of(model, tokenizer)
        tolerance = None if self.batching.prefill is None else self.batching.prefill.tolerance
        tolerance = 16 * torch.finfo(dtype).eps if tolerance is None else tolerance
        self._reading = PromptReading(self._passes, self.batching, tolerance, eod_id, exits)
        self._prefixes = Prefixes(self.batching.prefix_slots, 16, self._passes.cached_slots)
        self.usage = Usage()
        self.live: list[Sequence] = []
        self.waiting: deque[Sequence] = deque()
        self._free_rows = list(range(self.batching.max_sequences))[::-1]
        self._cleared: list[int] = []
        self._windows: list[int] = []  # that are over
        self._finished: list[Finished] = []
        self._decoding: list[Sequence] = []
        self._iterating: list[Sequence] = []
        self._stored: list[tuple[int, int, int]] = []
        self._dropped: list[int] = []
        self._chooses, self._exits, self._wishes = chooses, exits, Wishes()

    @property
    def idle(self) -> bool:
        """Whether there is nothing to run."""
        return not (self.live or self.waiting or self._cleared or self._windows)

    @property
    def slots(self) -> int:
        """Slots of the live sequences in the cache."""
        return sum(sequence.length for sequence in self.live)

    def check(self, request: Request) -> None:
        """Refuse what can never run.

        Raises:
            UserError: the model or the cache is too small for it, or it needs a tokenizer that is not there.
        """
        tokens, limit = len(request.prompt) + request.max_new_tokens, self._model.max_position_embeddings
        if tokens > limit:
            has = counted(len(request.prompt), "token")
            raise UserError(
                f"the prompt has {has} and {request.max_new_tokens} new ones are asked for, but the model is meant "
                f"for {limit}; shorten the prompt or ask for fewer"
            )
        if (most := self._passes.most_slots(tokens)) > self.batching.max_slots:
            raise UserError(
                f"{tokens} tokens may need {most} slots, but the cache is limited to "
                f"{self.batching.max_slots}; raise max_slots, where memory is free for it or --tensor and --pipeline "
                "ranks share it, or ask for fewer tokens"
            )
        if not all(0 <= token < self._pieces for token in request.prompt):
            raise UserError(f"the prompt has token ids outside of 0 to {self._pieces - 1}; use the model's tokenizer")
        if request.stop_strings and self._tokenizer is None:
            raise UserError("stop strings need a tokenizer; give stop tokens, or a checkpoint with its tokenizer")

    def submit(self, request: Request, on_token: OnToken | None = None) -> Sequence:
        """Queue a request.

        Args:
            request: what to generate.
            on_token: called with the generation after each of its tokens and at its end.

        Raises:
            UserError: as `check`.
        """
        self.check(request)
        stream = None
        if self._tokenizer is not None:
            stream = TextStream(self._tokenizer, request.prompt, request.stop_strings)
        generation = Generation(list(request.prompt), own_latents=self._passes.own)
        now = time.perf_counter()
        chooser = Chooser(request.sampling, request.prompt)
        sequence = Sequence(request, generation, chooser, stream, on_token, now, list(request.prompt))
        if request.max_new_tokens == 0:
            self._end(sequence, "length")
        else:
            self.waiting.append(sequence)
        return sequence

    def cancel(self, sequence: Sequence) -> None:
        """Let go of a request, wherever it is; nothing happens to one that has ended."""
        if sequence.generation.finish_reason is None:
            if sequence in self.waiting:
                self.waiting.remove(sequence)
            self._end(sequence, "cancelled")

    def plan(self) -> Forward | None:
        """The next forward, whose outcome is for `settle`; None if there is nothing to do.

        A forward may have no slots, when all that is left to do is to free memory.
        """
        if self.idle:
            return None
        self._make_room()
        loaded = self._admit()
        lanes = range(self._passes.lanes)
        forward = Forward(
            cleared=[self._lane(row, lane) for row in self._cleared for lane in lanes] + self._windows,
            finished=self._finished,
            stored=self._in_lanes(self._stored),
            dropped=[self._lane(key, lane) for key in self._dropped for lane in lanes],
            loaded=self._in_lanes(loaded),
        )
        self._cleared, self._windows, self._finished, self._stored, self._dropped = [], [], [], [], []
        self._reading.begin(self.live)
        self._decoding = [sequence for sequence in self.live if sequence.piece is None]
        self._iterating = [sequence for sequence in self.live if sequence.piece is not None]
        for sequence in self._decoding:
            if sequence.step == 0 or self._exits:
                forward.routed.append(len(forward))
            if sequence.step == 0:
                forward.add(sequence.ids[sequence.fed], 0, sequence.position, 0.0)
            else:
                forward.add(latent(sequence.step), sequence.source, sequence.position, sequence.log_w[sequence.step])
            lane = sequence.step % self._passes.lanes
            start = sequence.length // self._passes.lanes
            forward.segments.append(Segment(self._lane(sequence.row, lane), start, 1))
            forward.steps.append(sequence.step)
            may_end = self._exits or sequence.step in (0, sequence.executed)
            forward.wanted.append(may_end and not sequence.reading)
        for sequence in self._iterating:
            start = sequence.length // self._passes.lanes
            sequence.piece.add_to(forward, self._lane(sequence.row, 0), start)
        if not self._chooses:
            forward.choices = self._wishes.of(forward, self._decoding, self._iterating)
        self.usage.forwards += bool(forward)
        self.usage.rows += len(self.live)
        self.usage.slots += len(forward)
        return forward

    def settle(self, forward: Forward, outcome: Outcome) -> None:
        """Take the outcome of the forward that was planned last: sequences advance, and get tokens.

        Args:
            forward: the one planned.
            outcome: of it.
        """
        routings = iter(zip(outcome.executed, outcome.log_w, strict=True))
        predicted: list[Sequence | None] = []
        read: list[Sequence] = []
        for index, sequence in enumerate(self._decoding):
            sequence.source = index
            if sequence.step == 0 or self._exits:
                sequence.executed, sequence.log_w = next(routings)
            complete = sequence.step == sequence.executed
            if complete and forward.wanted[index]:
                predicted.append(sequence)
            if sequence.generation.finish_reason is not None:  # cancelled on the way
                continue
            sequence.length += 1
            sequence.step += 1
            if complete:
                sequence.length -= sequence.executed if self._passes.own else 0
                self._complete(sequence, [sequence.executed], read)
        for index, sequence in enumerate(self._iterating):
            if forward.prompts[index].last_token is not None:
                predicted.append(sequence)
            if sequence.generation.finish_reason is None:
                self._advance(sequence, sequence.piece.settle(outcome, index), read)
        self._predict(predicted, outcome)
        for sequence in read:
            if sequence.generation.finish_reason != "failed":  # whose keys may be no numbers
                self._store(sequence)

    def _admit(self) -> list[tuple[int, int, int]]:
        """Let waiting sequences enter while there is room; what they share with stored prompts is to be loaded."""
        loaded, staying = [], []
        used = sum(sequence.length + sequence.next_slots for sequence in self.live)
        while self.waiting and self._free_rows:
            sequence = self.waiting[0]
            tokens = np.array(sequence.ids)
            most = self._passes.most_slots(len(tokens))
            if used + most > self.batching.max_slots:
                break  # in turn: a later, shorter one must not keep it waiting for ever
            self.waiting.popleft()
            if self._worth_waiting(tokens):
                staying.append(sequence)
                continue
            sequence.row = self._free_rows.pop()
            if len(sequence.generation.tokens) == 0:
                sequence.generation.seconds_waited = time.perf_counter() - sequence.submitted
            match = None if self._splits(tokens) else self._prefixes.match(tokens)
            if match is not None:
                loaded.append((match.key, sequence.row, match.slots))
                sequence.length = match.slots
                sequence.fed = sequence.position = len(match.executed)
                sequence.generation.executed_steps.extend(match.executed)
                self.usage.shared += len(match.executed)
            self.live.append(sequence)
            used += most
        self.waiting.extendleft(reversed(staying))
        return loaded

    def _worth_waiting(self, tokens: np.ndarray) -> bool:
        """Whether a live sequence is reading a prompt that begins like this one and will be stored."""
        if not self.batching.prefix_slots or self._splits(tokens):
            return False
        match = self._prefixes.match(tokens)
        enough = max(self._prefixes.shortest, 0 if match is None else len(match.executed) + 1)
        return any(
            sequence.fed < len(sequence.request.prompt)
            and shared_tokens(np.array(sequence.request.prompt), tokens[:-1]) >= enough
            and not self._splits(np.array(sequence.request.prompt))
            for sequence in self.live
        )

    def _splits(self, tokens: np.ndarray) -> bool:
        """Whether a document ends in these tokens, so that what follows does not depend on what comes before."""
        return self._eod_id is not None and bool((tokens == self._eod_id).any())

    def _advance(self, sequence: Sequence, executed: list[int], read: list[Sequence]) -> None:
        """Note that tokens of a piece are final, with K̂ of each."""
        piece = sequence.piece
        if piece.done:
            sequence.piece = None
            self._windows += self._reading.windows([sequence.row])
        if executed:
            self._finished += [piece.finished] if piece.finished is not None else []
            sequence.length += self._passes.cached_slots(executed)
            self._complete(sequence, executed, read)

    def _make_room(self) -> None:
        """Send the newest sequences back to waiting until the slots of the next forward fit; the oldest always can."""
        used = sum(sequence.length + sequence.next_slots for sequence in self.live)
        while used > self.batching.max_slots and len(self.live) > 1:
            sequence = self.live.pop()
            used -= sequence.length + sequence.next_slots
            self._release(sequence)
            sequence.rewind()
            self.waiting.appendleft(sequence)
            self.usage.preempted += 1

    def _lane(self, number: int, lane: int) -> int:
        """The row of one of a sequence's lines of keys in the cache, or its key among the stored prompts."""
        return number * self._passes.lanes + lane

    def _in_lanes(self, entries: list[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
        """Key, row and slots of prompts that are stored or loaded, for each line of keys."""
        count = self._passes.lanes
        return [
            (self._lane(key, lane), self._lane(row, lane), slots // count)
            for key, row, slots in entries
            for lane in range(count)
        ]

    def _complete(self, sequence: Sequence, executed: list[int], read: list[Sequence]) -> None:
        """Note that the next tokens of a sequence have run all their steps, and in `read` if its prompt has."""
        sequence.generation.executed_steps.extend(executed)
        sequence.fed += len(executed)
        sequence.position += len(executed)
        sequence.step = 0
        if sequence.fed == len(sequence.request.prompt):
            read.append(sequence)
        if sequence.ids[sequence.fed - 1] == self._eod_id:
            self._cleared.append(sequence.row)
            sequence.length = sequence.position = 0

    def _store(self, sequence: Sequence) -> None:
        """Keep a prompt that was read, if it is worth it."""
        tokens = np.array(sequence.request.prompt)
        if not self._splits(tokens):
            key, dropped = self._prefixes.store(tokens, sequence.generation.executed_steps)
            self._dropped += dropped
            if key is not None:
                self._stored.append((key, sequence.row, sequence.length))

    def _predict(self, sequences: list[Sequence | None], outcome: Outcome) -> None:
        """Give every sequence its next token, from the row of logits or the prediction in its place."""
        if not (rows := [row for row, each in enumerate(sequences) if each and each.generation.finish_reason is None]):
            return
        chosen = [sequences[row] for row in rows]
        if outcome.predictions is not None:
            predictions = [outcome.predictions[row] for row in rows]
        else:
            logits = (outcome.logits if len(rows) == len(sequences) else outcome.logits[rows])[:, : self._pieces]
            top = [each.request.top_log_probabilities for each in chosen]
            predictions = predict(logits, [each.chooser for each in chosen], top)
        for sequence, prediction in zip(chosen, predictions, strict=True):
            reason, error = self._extend(sequence, prediction)
            if reason is not None:
                self._end(sequence, reason, error)
            elif sequence.on_token is not None:
                sequence.on_token(sequence.generation)

    def _extend(self, sequence: Sequence, prediction: Prediction | None) -> tuple[FinishReason | None, str]:
        """Append what comes next to a sequence; how that ends it, if it does, and what has failed."""
        if prediction is None:
            return "failed", NOT_FINITE
        self.usage.tokens += 1
        try:
            return sequence.extend(prediction), ""
        except Exception as error:  # a bug, which shows its traceback; but the others have nothing to do with it
            traceback.print_exc()
            return "failed", f"the continuation could not be written ({error}), which is a bug"

    def _end(self, sequence: Sequence, reason: FinishReason, error: str = "") -> None:
        sequence.end(reason, error)
        self._wishes.end(sequence)
        if sequence in self.live:
            self.live.remove(sequence)
            self._release(sequence)
        if sequence.on_token is not None:
            sequence.on_token(sequence.generation)

    def _release(self, sequence: Sequence) -> None:
        self._cleared.append(sequence.row)
        self._windows += self._reading.windows([sequence.row])
        self._free_rows.append(sequence.row)
