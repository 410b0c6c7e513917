"""Prompts by Jacobi iteration: every forward runs all surviving slots of a piece of prompt at once.

Iterate i runs steps 0..i of every token, as the growth passes do, and from then on all that its routing lets survive;
each latent slot reads the hidden state that the iterate before gave the slot before it. The fixed point is the
sequential model: a slot is right one iterate after everything before it is, and contraction makes it far fewer.
Slots that the router prunes are not there, so that nothing is computed for them. Passes that are not iterated are run
once, one after another, which is exact.
"""

import math
from dataclasses import dataclass
from typing import Protocol

from megatron_ponder.config.declarations import check_ranges, number_field
from megatron_ponder.generation.forward import Forward, Outcome, PromptEnd, Segment, latent
from megatron_ponder.model.modes.pondering import Passes


@dataclass(frozen=True)
class Prefill:
    """How prompts are read.

    Attributes:
        refinements: R of `jacobi`; iterated to the fixed point unless given.
        tolerance: share of the largest hidden state; where none changes by more, the fixed point is reached. 16 units
            of rounding unless given.
        chunk: tokens of a prompt that are iterated together; those before them are final by then.
        shortest: prompts with fewer tokens left than this for each live sequence are read slot by slot, as generation
            goes on, which then costs less than iterating; no matter for a model without steps, which never iterates.
    """

    refinements: int | None = number_field(None, 0, 10**6)
    tolerance: float | None = number_field(None, 0, 1, below=True)
    chunk: int = number_field(128, 1, 10**6)
    shortest: int = number_field(24, 1, 10**6)

    def __post_init__(self) -> None:
        check_ranges(self)


class PromptPiece(Protocol):
    """Some tokens of a prompt, which a few forwards run together.

    Attributes:
        tokens: token ids.
        executed: K̂ of each by the newest routing.
    """

    tokens: list[int]
    executed: list[int]

    @property
    def slots(self) -> int:
        """Slots of the next forward."""

    def add_to(self, forward: Forward, row: int, start: int, wanted: bool) -> None:
        """Add what the next forward runs.

        Args:
            forward: being planned.
            row: of the cache; the first of the sequence's.
            start: slots of the sequence in it before this piece.
            wanted: whether the logits after the last token are.
        """

    def settle(self, outcome: Outcome, index: int) -> bool:
        """Take the outcome of a forward, in which this piece is the prompt of the given index.

        Returns:
            Whether it was the last, so that what is in the cache by now is what the piece leaves there.
        """


class IteratedPiece:
    """The Jacobi iteration over some tokens; where the passes are not iterated, one forward of all their slots.

    Attributes:
        tokens: token ids.
        executed: K̂ of each by the newest routing.
        log_w: log weights (K + 1) of each by the newest routing.
    """

    def __init__(self, tokens: list[int], position: int, passes: Passes, prefill: Prefill, tolerance: float) -> None:
        """Begin.

        Args:
            tokens: at least one.
            position: of the first.
            passes: of the model.
            prefill: how to iterate.
            tolerance: as in `Prefill`, with its default resolved.
        """
        self.tokens = tokens
        self._position, self._steps, self._iterated = position, passes.steps, passes.iterated
        self._refinements, self._tolerance = prefill.refinements, tolerance
        self._iterate = 0
        self.executed = [0] * len(tokens)
        self.log_w = [[0.0] * (passes.steps + 1)] * len(tokens)
        # Of the newest iterate: the latent steps it ran of each token, and where in its forward each token begins.
        self._ran = [0] * len(tokens)
        self._at: list[int] = []
        self._routed = 0

    @property
    def slots(self) -> int:
        """Slots of the next iterate."""
        return len(self.tokens) + sum(self._running())

    def add_to(self, forward: Forward, row: int, start: int, wanted: bool) -> None:
        """Add the next iterate to a forward.

        Args:
            forward: being planned.
            row: of the cache.
            start: slots of the sequence before this piece.
            wanted: whether the logits after the last token are.
        """
        running, begin = self._running(), len(forward)
        same = bool(self._at) and running == self._ran
        before, self._at, self._routed = self._at or [0] * len(self.tokens), [], len(forward.routed)
        for index, (token, steps) in enumerate(zip(self.tokens, running, strict=True)):
            self._at.append(len(forward))
            forward.routed.append(len(forward))
            forward.add(token, 0, self._position + index, 0.0)
            for step in range(1, steps + 1):
                forward.add(latent(step), before[index] + step - 1, self._position + index, self.log_w[index][step])
        count = len(forward) - begin
        forward.segments.append(Segment(row, start, count))
        forward.prompts.append(PromptEnd(begin, count, before[0] if same else None, self._at[-1] if wanted else None))
        self._ran = running

    def settle(self, outcome: Outcome, index: int) -> bool:
        """Take the routing of the newest iterate.

        Args:
            outcome: of the forward.
            index: of this piece among the forward's prompts.

        Returns:
            Whether it was the last iterate, so that what it stored in the cache is what the piece leaves there.
        """
        routed = slice(self._routed, self._routed + len(self.tokens))
        self.executed, self.log_w = outcome.executed[routed], outcome.log_w[routed]
        self._iterate += 1
        if not self._iterated:
            return True
        if self._refinements is not None:
            done = self._iterate > self._steps + self._refinements
        else:
            most = len(self.tokens) * (self._steps + 1) + self._steps  # where rounding alone lets a K̂ flip for ever
            done = self._running() == self._ran and outcome.changes[index] <= self._tolerance
            # What is not a number stays so, however often it is iterated.
            done |= self._iterate > most or math.isnan(outcome.changes[index])
        if done:
            self.executed = self._ran
        return done

    def _running(self) -> list[int]:
        """Latent steps of each token in the next iterate: a latent needs the slot before it in this one."""
        if not self._at:
            return [0 if self._iterated else self._steps] * len(self.tokens)
        return [min(steps, ran + 1) for steps, ran in zip(self.executed, self._ran, strict=True)]


class LanePiece:
    """Passes with keys of their own: every forward runs one step of all tokens.

    Attributes:
        tokens: token ids.
        executed: K for each.
    """

    def __init__(self, tokens: list[int], position: int, passes: Passes) -> None:
        """Begin with at least one token, the first at `position`."""
        self.tokens, self.executed = tokens, [passes.steps] * len(tokens)
        self._position, self._steps = position, passes.steps
        self._step = self._at = 0

    @property
    def slots(self) -> int:
        return len(self.tokens)

    def add_to(self, forward: Forward, row: int, start: int, wanted: bool) -> None:
        before, self._at, count, step = self._at, len(forward), len(self.tokens), self._step
        for index, token in enumerate(self.tokens):
            forward.add(latent(step) if step else token, before + index, self._position + index, 0.0)
        forward.segments.append(Segment(row + step, start, count))
        last = self._at + count - 1 if wanted and step == self._steps else None
        forward.prompts.append(PromptEnd(self._at, count, None, last))

    def settle(self, outcome: Outcome, index: int) -> bool:
        self._step += 1
        return self._step > self._steps
