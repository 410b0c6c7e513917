"""What one forward of generation runs, and what comes of it: all that travels between scheduling and the model."""

from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from megatron_ponder.generation.predictions import Prediction
from megatron_ponder.generation.sampling import Sampling

# The order of a place whose slot nobody sees.
NOTHING = 1 << 40


def latent(step: int) -> int:
    """What stands in place of a token id in the slot of a latent step, whose input comes from the model."""
    return -step


class Segment(NamedTuple):
    """Slots that one forward runs of one sequence; they lie side by side in the forward and in the cache.

    Attributes:
        row: of the cache.
        start: slots of the sequence in the cache before these.
        count: how many slots.
    """

    row: int
    start: int
    count: int


class Window(NamedTuple):
    """Slots of a prompt that are not final yet, in a row of the cache of their own.

    Attributes:
        row: of the cache, which holds those that are final.
        final: how many these are; all slots of the window see them.
        places: of the slots that run, in the window's row.
        orders: of every place of that row, where its slot stands among those of the window; `NOTHING` where there is
            none that may be seen. A slot sees those that stand before it, and itself.
    """

    row: int
    final: int
    places: list[int]
    orders: list[int]


class Finished(NamedTuple):
    """Slots of a window that have become final, which are to be moved behind those that were.

    Attributes:
        window: row of the cache that holds the window.
        places: of the slots in it.
        row, start: where to.
    """

    window: int
    places: list[int]
    row: int
    start: int


class Apart(NamedTuple):
    """Slots of tokens that are read, of which all but the first slots are seen by their own token alone.

    Attributes:
        final: slots of the sequence before these, which all of them see.
        tokens: of every place behind those up to the last that runs, the token that its slot is of, from 0.
        first: how many of these, in front, are first slots.
    """

    final: int
    tokens: list[int]
    first: int


class PromptSlots(NamedTuple):
    """What a segment is, if it is of a prompt that is read.

    Attributes:
        at: index of the segment's first slot in this forward.
        count: how many slots.
        last_token: index of the first slot of the last token if its logits are wanted, else None.
        window: where the slots are, if they are iterated; else they are final, and see each other and all before them.
        apart: who sees whom, if slots of latent steps are seen by their own token alone.
    """

    at: int
    count: int
    last_token: int | None = None
    window: Window | None = None
    apart: Apart | None = None


class Begun(NamedTuple):
    """A sequence whose tokens will have to be chosen.

    Attributes:
        key: of it.
        sampling: its rules.
        prompt: token ids.
    """

    key: int
    sampling: Sampling
    prompt: tuple[int, ...]


class Wish(NamedTuple):
    """A token of a sequence that may be due after a forward: its number, from 0, and how many likeliest ids beside."""

    key: int
    number: int
    top: int


@dataclass
class Choices:
    """What goes with a forward to the rank that chooses.

    Attributes:
        begun: sequences to know from now on.
        ended: keys of those to forget.
        wishes: of each sequence that decodes, then of each prompt whose logits are wanted.
    """

    begun: list[Begun] = field(default_factory=list)
    ended: list[int] = field(default_factory=list)
    wishes: list[Wish] = field(default_factory=list)

    @property
    def columns(self) -> int:
        """Numbers that a wish takes in the tensor that comes back: state, token, log-probability, likeliest ids."""
        return 3 + 2 * max((wish.top for wish in self.wishes), default=0)


@dataclass
class Forward:
    """T slots of any sequences: first R sequences that decode, one slot each, then segments of prompts.

    Attributes:
        tokens: T token ids, `latent(step)` for latent slots.
        sources: T indices into the forward before; read where the slot is latent.
        positions: T RoPE positions.
        log_w: T log weights as keys.
        segments: of all slots, in their order; the first R of one slot each.
        steps: R, which step of its token each decoding sequence runs; 0 is the token itself.
        wanted: R, whether the logits are wanted if this slot is the last of its token, which it may be.
        routed: indices of slots after which K̂ may be known, those of the decoding sequences first: of tokens, which
            routing decides; with an exit, of all.
        prompts: the segments that are of prompts.
        finished: slots of windows to move, before all else.
        stored: prompts to keep, after that: a key, the row of the cache and the slots from its first on.
        dropped: keys of prompts to keep no longer.
        cleared: rows of the cache to empty before this forward.
        loaded: prompts to copy into rows after that: key, row, slots.
        choices: what the last rank of a pipeline has to know to choose the next tokens; nothing elsewhere.
    """

    tokens: list[int] = field(default_factory=list)
    sources: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    log_w: list[float] = field(default_factory=list)
    segments: list[Segment] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    wanted: list[bool] = field(default_factory=list)
    routed: list[int] = field(default_factory=list)
    prompts: list[PromptSlots] = field(default_factory=list)
    finished: list[Finished] = field(default_factory=list)
    stored: list[tuple[int, int, int]] = field(default_factory=list)
    dropped: list[int] = field(default_factory=list)
    cleared: list[int] = field(default_factory=list)
    loaded: list[tuple[int, int, int]] = field(default_factory=list)
    choices: Choices = field(default_factory=Choices)

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def deciding(self) -> list[int]:
        """Those of `routed` that are of decoding sequences."""
        return [index for index in self.routed if index < len(self.steps)]

    def add(self, token: int, source: int, position: int, log_w: float) -> None:
        """Append one slot."""
        self.tokens.append(token)
        self.sources.append(source)
        self.positions.append(position)
        self.log_w.append(log_w)


@dataclass
class Outcome:
    """What the last part of the model says of a forward.

    Attributes:
        executed: K̂ of each routed slot's token, as far as it is known: K while no exit was taken; empty where all
            tokens take the same steps.
        log_w: log weights (K + 1) as keys of each routed slot's token; empty likewise.
        logits: (n, V) of the next token: of the wanted sequences that completed their token, in their order, then of
            the prompts that wanted them. None where the last rank of a pipeline has chosen by them.
        changes: of each prompt's segment, by how much the hidden state of each slot has changed since its place in the
            window was last filled, relative to the largest of the segment; nothing where there is no window.
        predictions: what was chosen by the logits, of each None if they name no token; None for the scheduler to do.
    """

    executed: list[int]
    log_w: list[list[float]]
    logits: Tensor | None
    changes: list[list[float]]
    predictions: list[Prediction | None] | None = None
