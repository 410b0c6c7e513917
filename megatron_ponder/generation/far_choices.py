"""Tokens that the last rank of a pipeline chooses, where the logits are, for the first one, which schedules.

What comes back of a forward is one tensor whose size both know beforehand. Whether a choice counts, the scheduler says.
So nothing is drawn or noted for good before the sequence goes on to its next token.
"""

from itertools import count, islice

import torch
from torch import Tensor

from megatron_ponder.generation.forward import Begun, Choices, Forward, Outcome, PromptSlots, Wish
from megatron_ponder.generation.predictions import Prediction, predict
from megatron_ponder.generation.sampling import Chooser, Sampling
from megatron_ponder.generation.sequences import Sequence

ABSENT, CHOSEN, FAILED = range(3)


class Wishes:
    """What the scheduler tells the rank that chooses."""

    def __init__(self) -> None:
        self._keys, self._ended = count(), []

    def of(self, forward: Forward, decoding: list[Sequence], iterating: list[Sequence]) -> Choices:
        """What goes with a forward: of the sequences that decode, and of those whose prompts are iterated."""
        ended, self._ended = self._ended, []
        choices = Choices(ended=ended)
        prompts = zip(iterating, forward.prompts, strict=True)
        for sequence in [*decoding, *(sequence for sequence, end in prompts if end.last_token is not None)]:
            request = sequence.request
            if sequence.key is None:
                sequence.key = next(self._keys)
                choices.begun.append(Begun(sequence.key, request.sampling, request.prompt))
            wish = Wish(sequence.key, len(sequence.generation.tokens), request.top_log_probabilities)
            choices.wishes.append(wish)
        return choices

    def end(self, sequence: Sequence) -> None:
        """Let a sequence be forgotten with the next forward."""
        if sequence.key is not None:
            self._ended.append(sequence.key)


class FarChooser:
    """Chooses on the last pipeline rank."""

    def __init__(self, pieces: int) -> None:
        """Know no sequence; ids below `pieces` may be chosen."""
        self._pieces = pieces
        self._choosers: dict[int, _Tentative] = {}

    def choose(self, forward: Forward, outcome: Outcome) -> list[Prediction | None]:
        """The next tokens, one for each row of the outcome's logits; None where it has none."""
        choices = forward.choices
        self._choosers |= {begun.key: _Tentative(begun.sampling, begun.prompt) for begun in choices.begun}
        due = [choices.wishes[index] for index in due_wishes(forward, outcome.executed)]
        choosers = [self._choosers[wish.key].at(wish.number) for wish in due]
        predictions = predict(outcome.logits[:, : self._pieces], choosers, [wish.top for wish in due]) if due else []
        for key in choices.ended:
            del self._choosers[key]
        return predictions


class _Tentative(Chooser):
    """A chooser that is asked for the same token again until the sequence takes one."""

    def __init__(self, sampling: Sampling, prompt: tuple[int, ...]) -> None:
        super().__init__(sampling, prompt)
        self._number, self._drawn, self._chosen = 0, None, None

    def at(self, number: int) -> "_Tentative":
        """Go on to the token of that number; the one before has been taken."""
        if number != self._number:
            super().add(self._chosen)
            self._number, self._drawn = number, None
        return self

    def draw(self) -> float:
        if self._drawn is None:
            self._drawn = super().draw()
        return self._drawn

    def add(self, token: int) -> None:
        self._chosen = token


def due_wishes(forward: Forward, executed: list[int]) -> list[int]:
    """Indices of the wishes that a forward fulfils, in the order of its logits.

    Args:
        forward: whose decoding sequences want logits only in slots that may be the last of their token.
        executed: K̂ of its routed slots' tokens.
    """
    last = dict(zip(forward.deciding, executed, strict=False))  # of the others, what is wanted is the last
    due = [
        index
        for index, (step, wanted) in enumerate(zip(forward.steps, forward.wanted, strict=True))
        if wanted and last.get(index, step) == step
    ]
    return due + list(range(len(forward.steps), len(forward.choices.wishes)))


def packed_size(forward: Forward, steps: int) -> int:
    """Numbers of the tensor that `pack` makes for a forward of a model of K = `steps`."""
    choices = forward.choices
    changes = sum(map(_changes, forward.prompts))
    return len(forward.routed) * (steps + 2) + changes + len(choices.wishes) * choices.columns


def pack(forward: Forward, outcome: Outcome, predictions: list[Prediction | None]) -> Tensor:
    """What the scheduler needs to know, in fp64, which holds ids and fp32 numbers exactly."""
    rows = [[ABSENT] + [0.0] * (forward.choices.columns - 1) for _ in forward.choices.wishes]
    for index, prediction in zip(due_wishes(forward, outcome.executed), predictions, strict=True):
        if prediction is None:
            rows[index][0] = FAILED
            continue
        values = [CHOSEN, prediction.token, prediction.log_probability]
        values += [number for pair in prediction.top for number in pair]
        rows[index][: len(values)] = values
    numbers = [*outcome.executed, *_flat(outcome.log_w), *_flat(outcome.changes), *_flat(rows)]
    return torch.tensor(numbers, dtype=torch.float64)


def unpack(forward: Forward, numbers: Tensor, steps: int) -> Outcome:
    """The outcome of a forward from the tensor that `pack` has made."""
    values, routed, wishes = numbers.tolist(), len(forward.routed), forward.choices.wishes
    executed, log_w = values[:routed], _rows(values[routed:], routed, steps + 1)
    rest = iter(values[routed * (steps + 2) :])
    changes = [list(islice(rest, _changes(prompt))) for prompt in forward.prompts]
    predictions = []
    for wish, row in zip(wishes, _rows(list(rest), len(wishes), forward.choices.columns), strict=True):
        if row[0] == CHOSEN:
            top = [(int(token), value) for token, value in _rows(row[3:], wish.top, 2)]
            predictions.append(Prediction(int(row[1]), row[2], top))
        elif row[0] == FAILED:
            predictions.append(None)
    return Outcome([int(count) for count in executed], log_w, None, changes, predictions)


def _changes(prompt: PromptSlots) -> int:
    """Changes that an outcome has of a prompt."""
    return 0 if prompt.window is None else prompt.count


def _flat(rows: list[list[float]]) -> list[float]:
    return [number for row in rows for number in row]


def _rows(values: list[float], count: int, width: int) -> list[list[float]]:
    return [values[index * width : (index + 1) * width] for index in range(count)]
