"""What a window of a prompt runs and lets go, with outcomes that a model could give."""

import pytest

from megatron_ponder.generation.forward import NOTHING, Forward, Outcome
from megatron_ponder.generation.prefill import Prefill
from megatron_ponder.generation.prompt_pieces import IteratedPiece
from megatron_ponder.model.modes.pondering import Passes

WINDOW = 7  # row


class Reading:
    """A piece of ten tokens whose forwards are noted.

    Attributes:
        final: K̂ of the tokens that are, in their order.
        sweeps: of each sweep, positions of its tokens.
        moved: places of the window that have become final.
    """

    def __init__(self, steps: int, executed, change, **prefill) -> None:
        self.piece = IteratedPiece(list(range(10)), 100, Passes(steps), Prefill(**prefill), 1e-3, WINDOW)
        self.final, self.sweeps, self.moved, self.forwards, slots = [], [], [], [], 0
        while not self.piece.done:
            forward = Forward()
            self.piece.add_to(forward, 2, slots)
            (prompt,) = forward.prompts
            positions = forward.positions
            step = -min(forward.tokens) if forward.tokens[0] < 0 else 0
            self.forwards.append((step, prompt.window))
            if step == 0:
                self.sweeps.append(positions)
            sweep = len(self.sweeps)
            outcome = Outcome(
                [executed(position - 100, sweep) for position in positions if step == 0],
                [[0.0] * (steps + 1) for _ in positions if step == 0],
                None,
                [[change(position - 100, step, sweep) for position in positions]],
            )
            new = self.piece.settle(outcome, 0)
            if new:
                assert self.piece.finished.start == slots and self.piece.finished.row == 2
                self.moved += self.piece.finished.places
                slots += len(new) + sum(new)
            self.final += new


def test_what_changes_no_more_leaves_with_all_before_it():
    """Sweep i changes what comes after the first 2 i tokens; what has just entered is new whatever it is."""
    reading = Reading(1, lambda index, sweep: 1, lambda index, step, sweep: 1.0 if index >= 2 * sweep else 0.0, chunk=4)
    assert [(row[0] - 100, row[-1] - 100) for row in reading.sweeps] == [(0, 3), (1, 4), (4, 7), (5, 8), (8, 9), (9, 9)]
    assert reading.final == [1] * 10
    assert reading.moved == [2 * (index % 4) + step for index in range(10) for step in range(2)]


def test_the_first_is_final_after_a_sweep_and_nothing_new_is():
    reading = Reading(1, lambda index, sweep: 1, lambda index, step, sweep: 1.0, chunk=3)
    assert [row[0] - 100 for row in reading.sweeps] == list(range(10))
    never = Reading(2, lambda index, sweep: 2, lambda index, step, sweep: 0.0, chunk=3)
    assert [len(row) for row in never.sweeps] == [3, 3, 3, 3, 3, 3, 1]  # a place is filled before it can stay so


def test_pruned_slots_are_not_run_nor_seen():
    """K̂ falls from 2 to 0 with the second sweep that a token takes part in."""
    seen: dict[int, int] = {}

    def executed(index: int, sweep: int) -> int:
        seen.setdefault(index, sweep)
        return 2 if sweep == seen[index] and index else 0

    reading = Reading(2, executed, lambda index, step, sweep: 0.0, chunk=4)
    assert reading.final == [0] * 10
    window = next(window for step, window in reading.forwards if step == 2)
    # The first token has no latent slots; of the others all three are there, in their order.
    assert window.orders == [0, NOTHING, NOTHING, 3, 4, 5, 6, 7, 8, 9, 10, 11]
    assert window.places == [5, 8, 11]
    assert max(order for order in reading.forwards[-1][1].orders if order < NOTHING) == 0


@pytest.mark.parametrize("refinements", [0, 2])
def test_refinements_are_sweeps(refinements):
    reading = Reading(1, lambda index, sweep: 1, lambda index, step, sweep: 1.0, chunk=5, refinements=refinements)
    assert len(reading.sweeps) == 2 * (refinements + 1)
    assert reading.final == [1] * 10


def test_what_is_not_a_number_comes_to_an_end():
    reading = Reading(1, lambda index, sweep: 1, lambda index, step, sweep: float("nan"), chunk=5)
    assert len(reading.final) == 10
    assert len(reading.sweeps) <= 10
