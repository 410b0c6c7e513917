"""The idle share that the benchmark counts: by hand, and against the formula."""

import pytest

from benchmarks.pipeline_schedule import KINDS, Action, actions_of, idle_of, idle_share
from megatron_ponder.model.passes import pass_slots


def test_two_ranks_by_hand():
    # rank 0: F0 at 0-1, F1 at 1-2, B0 at 4-6, B1 at 7-9; rank 1: F0 at 1-2, B0 at 2-4, F1 at 4-5, B1 at 5-7
    first = [Action(0, "F", 0), Action(0, "F", 1), Action(0, "B", 0), Action(0, "B", 1)]
    second = [Action(1, "F", 0), Action(1, "B", 0), Action(1, "F", 1), Action(1, "B", 1)]
    durations = {"F": 1.0, "B": 2.0}
    assert idle_share({0: first, 1: second}, lambda action: durations[action.kind]) == pytest.approx(1 - 12 / 18)


def test_gradients_of_weights_hold_nobody_up():
    # rank 1: F 1-2, I 2-3, W 3-4; rank 0: F 0-1, I 3-4, W 4-5
    ranks = {rank: [Action(rank, kind, 0) for kind in "FIW"] for rank in (0, 1)}
    assert idle_share(ranks, lambda action: 1.0) == pytest.approx(1 - 6 / 10)


def test_ranks_that_wait_for_each_other_are_seen():
    with pytest.raises(ValueError, match="nothing can start"):
        idle_share({0: [Action(0, "B", 0), Action(0, "F", 0)], 1: [Action(1, "F", 0)]}, lambda action: 1.0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("ranks", "micro_batches"), [(2, 2), (2, 8), (4, 8)])
def test_tables_have_every_action_once(kind, ranks, micro_batches):
    passes = 3
    actions = actions_of(kind, ranks, micro_batches, passes)
    done = [action for own in actions.values() for action in own]
    assert all(action.stage % ranks == rank for rank, own in actions.items() for action in own)
    assert len(set(done)) == len(done)
    cells = {(stage, micro_batch) for stage in range(passes * ranks) for micro_batch in range(micro_batches)}
    kinds = {cell: {a.kind for a in done if (a.stage, a.micro_batch) == cell} for cell in cells}
    assert all(found in ({"F", "B"}, {"F", "I", "W"}) for found in kinds.values())


@pytest.mark.parametrize("ranks", [2, 4, 8])
@pytest.mark.parametrize("plan", [pass_slots(0, 0), pass_slots(3, 2)])
def test_1f1b_fills_the_ring_once_for_all_passes(ranks, plan):
    for micro_batches in (ranks, 4 * ranks):
        even, by_slots = idle_of("1f1b", ranks, micro_batches, plan)
        formula = (ranks - 1) / (len(plan) * micro_batches + ranks - 1)
        assert even == pytest.approx(formula)
        assert by_slots >= even if len(plan) > 1 else by_slots == even
