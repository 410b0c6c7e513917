"""Schedules whose sends wait for receives: none waits for ever, and on streams of their own none holds another up."""

from itertools import product

import pytest

from benchmarks.rendezvous_sends import Simulation, busy_share, orders_with_messages
from megatron_ponder.config.layout import fits_schedule
from megatron_ponder.estimates.schedule_walk import Action, idle_share
from megatron_ponder.model.passes import pass_slots

KINDS, STREAMS = ("1f1b", "zero_bubble"), ("rank", "edge")
MODES = {"vanilla": pass_slots(0, 0), "K = 1, R = 0": pass_slots(1, 0), "K = 3, R = 2": pass_slots(3, 2)}


def test_a_message_holds_up_those_behind_it_by_hand():
    # rank 0 sends 1 and then 2; rank 1 takes 2 from the other stream at once, and 1 when it has computed for 10
    def ranks(name: str) -> dict[int, list[tuple[str, Action]]]:
        sends = [("FORWARD", Action(0, "F", 0)), ("SEND_F", Action(0, "SEND_F", 0)), (name, Action(2, name, 0))]
        receive = "RECV_F" if name == "SEND_F" else "RECV_B"
        receives = [(receive, Action(3 if name == "SEND_F" else 1, receive, 0)), ("FORWARD", Action(5, "F", 0))]
        last = [("RECV_F", Action(1, "RECV_F", 0)), ("FORWARD", Action(1, "F", 0))]
        return {0: sends, 1: [*receives, *last]}

    lengths = {0: 1.0, 5: 10.0, 1: 1.0}
    for streams, end in (("edge", 11.0), ("rank", None)):
        simulation = Simulation(ranks("SEND_B"), streams)
        if end is None:  # on one stream, rank 0 sends in one order and rank 1 takes them in the other
            with pytest.raises(ValueError, match="never start"):
                simulation.busy_share(lambda action: lengths[action.stage])
        else:
            assert simulation.busy_share(lambda action: lengths[action.stage]) == pytest.approx(12 / (2 * end))


def everything(ranks: range, rounds: int):
    """Every schedule that a configuration accepts, up to so many rounds."""
    for kind, size, plan in product(KINDS, ranks, MODES.values()):
        for count in filter(lambda count: fits_schedule(count, size), range(1, rounds * size + 1)):
            yield kind, size, count, plan


def check(cases) -> None:
    for kind, ranks, count, plan in cases:
        busy = {streams: busy_share(kind, ranks, count, plan, streams) for streams in STREAMS}
        walked = 1 - idle_share(kind, ranks, count, plan)
        assert busy["edge"] == pytest.approx(walked), (kind, ranks, count, plan)  # what estimates say
        assert busy["rank"] <= busy["edge"] + 1e-12


def test_no_schedule_waits_for_ever_and_an_edge_of_ones_own_loses_nothing():
    check(everything(range(2, 4), rounds=2))


@pytest.mark.slow
def test_nor_do_longer_ones():
    check(everything(range(4, 9), rounds=4))


@pytest.mark.parametrize(("ranks", "count", "one", "each"), [(4, 8, 0.66, 0.889), (8, 16, 0.493, 0.865)])
def test_what_one_stream_for_all_messages_costs(ranks, count, one, each):
    plan = pass_slots(3, 2)
    assert busy_share("1f1b", ranks, count, plan, "rank") == pytest.approx(one, abs=5e-4)
    assert busy_share("1f1b", ranks, count, plan, "edge") == pytest.approx(each, abs=5e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_messages_that_take_time_cost_what_estimates_say(kind):
    ranks, count, plan, message = 4, 8, pass_slots(3, 2), 0.125
    walked = 1 - idle_share(kind, ranks, count, plan, message)
    busy = [busy_share(kind, ranks, count, plan, "edge", time) for time in (0.0, message)]
    assert busy[1] == pytest.approx(walked, rel=0.02)
    assert busy[1] < busy[0]


def test_every_message_has_both_ends():
    for kind in KINDS:
        actions = orders_with_messages(kind, 3, 3, 2)
        names = [name for own in actions.values() for name, _ in own]
        assert names.count("SEND_F") == names.count("RECV_F") == 5 * 3
        assert names.count("SEND_B") == names.count("RECV_B") == 5 * 3
