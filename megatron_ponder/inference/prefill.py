"""Prompts by Jacobi iteration: every forward runs all surviving slots of a piece of prompt at once.

Iterate i runs steps 0..i of every token, as the growth passes do, and from then on all that its routing lets survive;
each latent slot reads the hidden state that the iterate before gave the slot before it. The fixed point is the
sequential model: a slot is right one iterate after everything before it is, and contraction makes it far fewer.
Slots that the router prunes are not there, so that nothing is computed for them.
"""

from dataclasses import dataclass

from megatron_ponder.errors import UserError
from megatron_ponder.inference.forward import LATENT, Forward, Outcome, PromptEnd, Segment


@dataclass(frozen=True)
class Prefill:
    """How prompts are read.

    Attributes:
        refinements: R of `jacobi`; None to iterate to the fixed point.
        tolerance: the fixed point is reached when no hidden state changes by more than this share of the largest;
            None for 16 units of rounding.
        chunk: tokens of a prompt that are iterated together; those before them are final by then.
        shortest: prompts with fewer tokens left than this for each live sequence are read slot by slot, as generation
            goes on, which then costs less than iterating; no matter for a model without steps, which never iterates.
    """

    refinements: int | None = None
    tolerance: float | None = None
    chunk: int = 128
    shortest: int = 24

    def __post_init__(self) -> None:
        if (self.refinements or 0) < 0:
            raise UserError("refinements must not be negative; leave them out to iterate to the fixed point")
        if self.chunk < 1 or self.shortest < 1:
            raise UserError("chunk and shortest must be at least 1 token")
        if not (self.tolerance is None or 0 <= self.tolerance < 1):  # written so that NaN is refused too
            raise UserError("tolerance must be a share from 0 up and below 1; leave it out for 16 units of rounding")


class PromptPiece:
    """The iteration over some tokens of a prompt.

    Attributes:
        tokens: token ids.
        executed: K̂ of each by the newest routing.
        log_w: log weights (K + 1) of each by the newest routing.
    """

    def __init__(self, tokens: list[int], position: int, steps: int, prefill: Prefill, tolerance: float) -> None:
        """Begin.

        Args:
            tokens: at least one.
            position: of the first.
            steps: K.
            prefill: how to iterate.
            tolerance: as in `Prefill`, with its default resolved.
        """
        self.tokens = tokens
        self._position, self._steps = position, steps
        self._refinements, self._tolerance = prefill.refinements, tolerance
        self._iterate = 0
        self.executed = [0] * len(tokens)
        self.log_w = [[0.0] * (steps + 1)] * len(tokens)
        # Of the newest iterate: the additional steps it ran of each token, and where in its forward each token begins.
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
        before, self._at, self._routed = self._at, [], len(forward.routed)
        for index, (token, steps) in enumerate(zip(self.tokens, running, strict=True)):
            self._at.append(len(forward))
            forward.routed.append(len(forward))
            forward.add(token, 0, self._position + index, 0.0)
            for step in range(1, steps + 1):
                forward.add(LATENT, before[index] + step - 1, self._position + index, self.log_w[index][step])
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
        if self._steps == 0:
            return True
        if self._refinements is not None:
            done = self._iterate > self._steps + self._refinements
        else:
            most = len(self.tokens) * (self._steps + 1) + self._steps  # where rounding alone lets a K̂ flip for ever
            done = self._running() == self._ran and outcome.changes[index] <= self._tolerance
            done |= self._iterate > most
        if done:
            self.executed = self._ran
        return done

    def _running(self) -> list[int]:
        """Additional steps of each token in the next iterate: a latent needs the slot before it in this one."""
        if not self._at:
            return [0] * len(self.tokens)
        return [min(steps, ran + 1) for steps, ran in zip(self.executed, self._ran, strict=True)]
