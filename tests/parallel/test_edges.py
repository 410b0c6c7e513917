"""Groups of neighbours on a ring: both ends of an edge have the same one, and no two messages need share one."""

from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch.distributed as dist

from megatron_ponder.parallel.edges import build_edges
from megatron_ponder.parallel.mesh import Axis

FIRST = 10  # the ring's ranks are from this number on


def on_every_rank(monkeypatch, size: int, bound: bool) -> tuple[list, list]:
    """The edges of every rank of a ring, whose groups are (name, ranks), and the calls that each made."""
    edges, calls = [], []
    world = SimpleNamespace(bound_device_id="cuda:0" if bound else None)
    for rank in range(size):
        own = []

        def split(parent, parts, timeout, group_desc, rank=rank, own=own):
            assert parent == "ring"
            assert sorted({place for part in parts for place in part}) == sorted(p for part in parts for p in part)
            key = group_desc, tuple(map(tuple, parts))
            own.append(key)
            part = next((part for part in parts if rank in part), None)
            return None if part is None else (group_desc, tuple(place + FIRST for place in part), own.count(key))

        def new(ranks, timeout, use_local_synchronization, group_desc, rank=rank, own=own):
            assert use_local_synchronization
            assert timeout == timedelta(seconds=7)
            assert rank + FIRST in ranks
            key = group_desc, tuple(sorted(ranks))
            own.append(key)
            return *key, own.count(key)

        monkeypatch.setattr(dist, "group", SimpleNamespace(WORLD=world))
        monkeypatch.setattr(dist, "split_group", split)
        monkeypatch.setattr(dist, "new_group", new)
        monkeypatch.setattr(dist, "get_global_rank", lambda group, place: place + FIRST)
        edges.append(build_edges(Axis(size, rank, "ring"), timedelta(seconds=7)))
        calls.append(own)
    return edges, calls


@pytest.mark.parametrize("bound", [False, True], ids=["made by two ranks", "split by all"])
@pytest.mark.parametrize("size", [2, 3, 4, 5, 8])
def test_both_ends_of_an_edge_have_the_same_group(monkeypatch, size, bound):
    edges, calls = on_every_rank(monkeypatch, size, bound)
    for rank, own in enumerate(edges):
        after = edges[(rank + 1) % size]
        assert own.to_next == after.from_last
        assert own.from_next == after.to_last
        assert set(own.to_next[1]) == {rank + FIRST, (rank + 1) % size + FIRST}
        assert len({own.from_last, own.to_next, own.to_last, own.from_next}) == 4
    if bound:  # all ranks of the ring split it together
        assert all(own == calls[0] for own in calls)
        assert len(calls[0]) == (4 if size % 2 == 0 else 6)
    for rank, own in enumerate(calls):  # and what two ranks make together, they make in one order
        for other in calls[rank + 1 :]:
            common = set(own) & set(other)
            assert [call for call in own if call in common] == [call for call in other if call in common]
            # as the same one of theirs, since its name has the number of groups that a rank has
            assert all(own.index(call) == other.index(call) for call in common)
