"""The share of a step in which pipeline ranks wait: by hand, against the formula, and against every action played."""

import pytest

from megatron_ponder.config.layout import fits_schedule
from megatron_ponder.estimates.schedule_walk import COSTS, Action, idle_share, orders, step_length
from megatron_ponder.model.passes import pass_slots

KINDS = ("1f1b", "zero_bubble")


def test_two_ranks_by_hand():
    # rank 0: F0 at 0-1, F1 at 1-2, B0 at 4-6, B1 at 7-9; rank 1: F0 at 1-2, B0 at 2-4, F1 at 4-5, B1 at 5-7
    first = [Action(0, "F", 0), Action(0, "F", 1), Action(0, "B", 0), Action(0, "B", 1)]
    second = [Action(1, "F", 0), Action(1, "B", 0), Action(1, "F", 1), Action(1, "B", 1)]
    assert step_length({0: first, 1: second}, lambda action: COSTS[action.kind]) == 9


def test_gradients_of_weights_hold_nobody_up():
    # rank 1: F 1-2, I 2-3, W 3-4; rank 0: F 0-1, I 3-4, W 4-5
    ranks = {rank: [Action(rank, kind, 0) for kind in "FIW"] for rank in (0, 1)}
    assert step_length(ranks, lambda action: 1.0) == 5


def test_messages_hold_up_what_reads_them():
    # rank 0: F 0-1, and B when the gradient has come; rank 1: F 1.5-2.5, B 2.5-4.5, whose gradient is there at 5
    ranks = {rank: [Action(rank, kind, 0) for kind in "FB"] for rank in (0, 1)}
    assert step_length(ranks, lambda action: COSTS[action.kind], (0.5,)) == 7
    assert idle_share("1f1b", 2, 1, (1,), 0.5) == pytest.approx(1 - 3 / 7)
    # a rank that has other work computes while a message is under way
    first = [Action(0, "F", 0), Action(0, "F", 1), Action(0, "B", 0), Action(0, "B", 1)]
    second = [Action(1, "F", 0), Action(1, "B", 0), Action(1, "F", 1), Action(1, "B", 1)]
    assert step_length({0: first, 1: second}, lambda action: COSTS[action.kind], (0.25,)) == 9.5


def test_ranks_that_wait_for_each_other_are_seen():
    with pytest.raises(ValueError, match="nothing can start"):
        step_length({0: [Action(0, "B", 0), Action(0, "F", 0)], 1: [Action(1, "F", 0)]}, lambda action: 1.0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("ranks", "micro_batches"), [(2, 2), (2, 8), (4, 8)])
def test_tables_have_every_action_once(kind, ranks, micro_batches):
    passes = 3
    actions = orders(kind, ranks, micro_batches, passes)
    done = [action for own in actions.values() for action in own]
    assert all(action.stage % ranks == rank for rank, own in actions.items() for action in own)
    assert len(set(done)) == len(done)
    cells = {(stage, micro_batch) for stage in range(passes * ranks) for micro_batch in range(micro_batches)}
    kinds = {cell: {a.kind for a in done if (a.stage, a.micro_batch) == cell} for cell in cells}
    assert all(found in ({"F", "B"}, {"F", "I", "W"}) for found in kinds.values())


@pytest.mark.parametrize("ranks", [2, 4, 8])
@pytest.mark.parametrize("passes", [1, 6])
def test_1f1b_fills_the_ring_once_for_all_passes(ranks, passes):
    for micro_batches in (ranks, 4 * ranks):
        even = idle_share("1f1b", ranks, micro_batches, (1,) * passes)
        assert even == pytest.approx((ranks - 1) / (passes * micro_batches + ranks - 1))
        if passes > 1:
            assert idle_share("1f1b", ranks, micro_batches, pass_slots(3, 2)) > even


@pytest.mark.parametrize("kind", KINDS)
def test_a_single_micro_batch_keeps_one_rank_busy_at_a_time(kind):
    for ranks, passes in ((2, 1), (2, 5), (4, 5)):
        own = 1 - 1 / ranks
        if kind == "1f1b":
            assert idle_share(kind, ranks, 1, (1,) * passes) == pytest.approx(own)
        else:
            assert idle_share(kind, ranks, 1, (1,) * passes) < own


def test_a_single_rank_waits_for_nobody():
    assert idle_share("1f1b", 1, 4, (1, 2)) == 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("message", [0.0, 0.125])
def test_further_rounds_take_as_long_as_the_last_that_is_played(kind, ranks, message):
    for plan in (pass_slots(0, 0), pass_slots(3, 2)):
        messages = [message * plan[stage // ranks] for stage in range(len(plan) * ranks - 1)]
        for micro_batches in filter(lambda count: fits_schedule(count, ranks), range(1, 5 * ranks + 1)):
            actions = orders(kind, ranks, micro_batches, len(plan))
            length = step_length(
                actions, lambda action, plan=plan: COSTS[action.kind] * plan[action.stage // ranks], messages
            )
            idle = 1 - 3 * sum(plan) * micro_batches / length
            assert idle_share(kind, ranks, micro_batches, plan, message) == pytest.approx(idle, abs=1e-12)
