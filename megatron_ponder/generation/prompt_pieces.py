"""Prompts by Gauss-Seidel iteration over a window of tokens.

A sweep runs, one forward after another, slot 0 of all tokens in the window, slot 1, and so on up to K̂ of each: a
latent slot reads the hidden state that the same sweep gave the slot before it, and sees the keys of the newest slots
that stand before it. The fixed point is the sequential model. Where no slot of a token, nor of those before it, has
changed in a sweep, the token is final: it leaves the window, and another enters at its end. The first of a window is
final after one sweep, which ran it as the sequential model does; contraction makes it many.

Slots that the router prunes are not there, so that nothing is computed for them. Passes that are not iterated are run
once, one after another, which is exact; so are steps whose slots are seen by their own token alone.
"""

from collections import deque
from dataclasses import dataclass
from typing import Protocol

from megatron_ponder.generation.forward import (
    NOTHING,
    Apart,
    Finished,
    Forward,
    Outcome,
    PromptSlots,
    Segment,
    Window,
    latent,
)
from megatron_ponder.generation.prefill import Prefill
from megatron_ponder.model.modes.pondering import Passes


class PromptPiece(Protocol):
    """Some tokens of a prompt, which are run together.

    Attributes:
        width: most slots of a forward.
        finished: slots that have to be moved before the next forward, as `settle` has found; None for none.
    """

    width: int
    finished: Finished | None

    @property
    def slots(self) -> int:
        """Places of the cache that the next forward and its outcome may take."""

    @property
    def done(self) -> bool:
        """Whether all tokens are final."""

    def add_to(self, forward: Forward, row: int, start: int) -> None:
        """Add what the next forward runs.

        Args:
            forward: being planned.
            row: of the cache; the first of the sequence's.
            start: slots of the sequence in it that are final.
        """

    def settle(self, outcome: Outcome, index: int) -> list[int]:
        """Take the outcome of a forward, in which this piece is the prompt of the given index.

        Returns:
            K̂ of the tokens that have become final.
        """


@dataclass
class _Token:
    """A token of a prompt that is iterated.

    Attributes:
        id: of it.
        index: from the first that is iterated.
        log_w: log weights (K + 1) by the newest routing.
        executed: K̂ by that, or, with an exit, as far as the newest sweep knows it.
        living: how many of its slots there are, from the first on.
        sweeps: that it has taken part in.
        changed: whether the newest one has changed any of its slots, or which they are.
    """

    id: int
    index: int
    log_w: list[float]
    executed: int = 0
    living: int = 0
    sweeps: int = 0
    changed: bool = True


class IteratedPiece:
    """Tokens of which those in a window are iterated."""

    def __init__(
        self,
        tokens: list[int],
        position: int,
        passes: Passes,
        prefill: Prefill,
        tolerance: float,
        row: int,
        exits: bool = False,
    ) -> None:
        """Begin.

        Args:
            tokens: at least one.
            position: of the first.
            passes: of the model.
            prefill: how to iterate.
            tolerance: as in `Prefill`, with its default resolved.
            row: of the cache, for what is not final.
            exits: as in `Scheduler`.
        """
        self._exits = exits
        self._slots, self._position, self._row = passes.steps + 1, position, row
        self._refinements, self._tolerance = prefill.refinements, tolerance
        self.width = min(prefill.chunk, len(tokens))
        self._waiting = deque(_Token(token, index, [0.0] * self._slots) for index, token in enumerate(tokens))
        self._window: list[_Token] = []
        # Of the newest forward: its step, the tokens that it runs, where they begin in it and among those routed; and
        # where in the cache what is final goes.
        self._step, self._running, self._at, self._routed, self._behind = 0, [], 0, 0, (0, 0)
        self.finished: Finished | None = None

    @property
    def slots(self) -> int:
        """Places of the window, and of what may become final."""
        return (self.width + min(self.width, len(self._window) + len(self._waiting))) * self._slots

    @property
    def done(self) -> bool:
        return not (self._window or self._waiting)

    def add_to(self, forward: Forward, row: int, start: int) -> None:
        step, at, before = self._step, len(forward), {}
        if step == 0:
            self._begin_sweep()
        else:
            before = {token.index: self._at + place for place, token in enumerate(self._running)}
            self._running = [token for token in self._running if token.executed >= step]
        if step == 0 or self._exits:
            self._routed = len(forward.routed)
            forward.routed.extend(range(at, at + len(self._running)))
        for token in self._running:
            given = latent(step) if step else token.id
            forward.add(given, before.get(token.index, 0), self._position + token.index, token.log_w[step])
            if token.living == step:  # nothing lies in its place that it could be compared with
                token.living, token.changed = step + 1, True
        self._at, self._behind = at, (row, start)
        window = Window(row, start, [self._place(token, step) for token in self._running], self._orders())
        forward.segments.append(Segment(self._row, 0, len(self._running)))
        forward.prompts.append(PromptSlots(at, len(self._running), window=window))

    def settle(self, outcome: Outcome, index: int) -> list[int]:
        for token, change in zip(self._running, outcome.changes[index], strict=True):
            token.changed |= change > self._tolerance  # what is not a number stays so, however often it is run
        if self._step == 0 or self._exits:
            self._route(outcome)
        self._step += 1
        if any(token.executed >= self._step for token in self._running):
            return []
        return self._end_sweep()

    def _begin_sweep(self) -> None:
        for token in self._window:
            token.changed = False
        while self._waiting and len(self._window) < self.width:
            self._window.append(self._waiting.popleft())
        self._running = self._window

    def _route(self, outcome: Outcome) -> None:
        routed = slice(self._routed, self._routed + len(self._running))
        routings = zip(outcome.executed[routed], outcome.log_w[routed], strict=True)
        for token, (executed, log_w) in zip(self._running, routings, strict=True):
            token.changed |= token.living > executed + 1
            token.executed, token.log_w, token.living = executed, log_w, min(token.living, executed + 1)

    def _end_sweep(self) -> list[int]:
        """Let the tokens leave that are final; K̂ of these."""
        self._step = 0
        for token in self._window:
            token.sweeps += 1
        if self._refinements is None:
            staying = next((place for place, token in enumerate(self._window) if token.changed), len(self._window))
            count = max(1, staying)  # all that the first one sees was final when the sweep began
        else:
            count = sum(token.sweeps > self._refinements for token in self._window)
        final, self._window = self._window[:count], self._window[count:]
        places = [self._place(token, step) for token in final for step in range(token.executed + 1)]
        self.finished = Finished(self._row, places, *self._behind)
        return [token.executed for token in final]

    def _place(self, token: _Token, step: int) -> int:
        return token.index % self.width * self._slots + step

    def _orders(self) -> list[int]:
        """As in `Window`."""
        orders = [NOTHING] * (self.width * self._slots)
        for number, token in enumerate(self._window):
            for step in range(token.living):
                orders[self._place(token, step)] = number * self._slots + step
        return orders


class _RunOnce:
    """Tokens that are not iterated."""

    finished = None

    def __init__(self, tokens: list[int], position: int, passes: Passes, wanted: bool) -> None:
        """Begin.

        Args:
            tokens: at least one.
            position: of the first.
            passes: of the model.
            wanted: whether the logits after the last token are.
        """
        self._tokens, self._position, self._steps, self._wanted = tokens, position, passes.steps, wanted

    @property
    def slots(self) -> int:
        return self.width


class WholePiece(_RunOnce):
    """Passes that are not iterated and share their keys: one forward runs all slots."""

    done = False

    @property
    def width(self) -> int:
        return len(self._tokens) * (self._steps + 1)

    def add_to(self, forward: Forward, row: int, start: int) -> None:
        at = len(forward)
        for index, token in enumerate(self._tokens):
            forward.routed.append(len(forward))
            forward.add(token, 0, self._position + index, 0.0)
            for step in range(1, self._steps + 1):
                forward.add(latent(step), 0, self._position + index, 0.0)
        forward.segments.append(Segment(row, start, self.width))
        forward.prompts.append(PromptSlots(at, self.width, len(forward) - self._steps - 1 if self._wanted else None))

    def settle(self, outcome: Outcome, index: int) -> list[int]:
        self.done = True
        return [self._steps] * len(self._tokens)


class ApartPiece:
    """Tokens whose latent slots no other sees: every forward runs one step of those that take it, once.

    Their first slots lie side by side in the cache, in which they stay; the others behind them, to be overwritten.
    """

    finished = None

    def __init__(self, tokens: list[int], position: int, passes: Passes) -> None:
        """Begin; arguments as of `IteratedPiece`."""
        self._tokens, self._position, self._steps = tokens, position, passes.steps
        self.width = len(tokens)
        self._executed: list[int] = [0] * len(tokens)
        self._log_w: list[list[float]] = [[0.0]] * len(tokens)
        # Of the newest forward: its step, the tokens that it runs, where they begin in it and among those routed; and
        # the token of every slot that there is, in the order of the cache.
        self._step, self._running, self._at, self._routed, self._placed = 0, [*range(len(tokens))], 0, 0, []
        self._before: dict[int, int] = {}

    @property
    def slots(self) -> int:
        return len(self._placed) + len(self._running)

    @property
    def done(self) -> bool:
        return not self._running

    def add_to(self, forward: Forward, row: int, start: int) -> None:
        step, at, before = self._step, len(forward), self._before
        if step == 0:
            self._routed = len(forward.routed)
            forward.routed.extend(range(at, at + len(self._running)))
        for index in self._running:
            given = latent(step) if step else self._tokens[index]
            forward.add(given, before.get(index, 0), self._position + index, self._log_w[index][step])
        forward.segments.append(Segment(row, start + len(self._placed), len(self._running)))
        self._placed = self._placed + self._running
        apart = Apart(start, self._placed, len(self._tokens))
        forward.prompts.append(PromptSlots(at, len(self._running), apart=apart))
        self._at = at

    def settle(self, outcome: Outcome, index: int) -> list[int]:
        if self._step == 0:
            routed = slice(self._routed, self._routed + len(self._tokens))
            self._executed, self._log_w = outcome.executed[routed], outcome.log_w[routed]
        self._before = {token: self._at + place for place, token in enumerate(self._running)}
        self._step += 1
        self._running = [token for token in self._running if self._executed[token] >= self._step]
        return self._executed if self.done else []


class LanePiece(_RunOnce):
    """Passes with keys of their own: every forward runs one step of all tokens."""

    _step = _at = 0

    @property
    def width(self) -> int:
        return len(self._tokens)

    @property
    def done(self) -> bool:
        return self._step > self._steps

    def add_to(self, forward: Forward, row: int, start: int) -> None:
        before, self._at, step = self._at, len(forward), self._step
        for index, token in enumerate(self._tokens):
            forward.add(latent(step) if step else token, before + index, self._position + index, 0.0)
        forward.segments.append(Segment(row + step, start, self.width))
        last = len(forward) - 1 if self._wanted and step == self._steps else None
        forward.prompts.append(PromptSlots(self._at, self.width, last))

    def settle(self, outcome: Outcome, index: int) -> list[int]:
        self._step += 1
        return [self._steps] * len(self._tokens) if self.done else []
