"""Process groups of some ranks, on the backend that only pretends, seen from one rank of many."""

from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_ponder.config import ParallelConfig
from megatron_ponder.parallel.groups import group_of
from megatron_ponder.parallel.mesh import build_mesh

RANKS, RANK = 64, 21


@pytest.fixture
def calls(monkeypatch):
    """Every group that is asked of PyTorch: by which function, its name, how long it waits, all that it is told."""
    dist.init_process_group("fake", store=FakeStore(), rank=RANK, world_size=RANKS)
    called, make = [], dist.new_group

    def new_group(ranks=None, timeout=None, **others):
        called.append(("new", others.get("group_desc"), timeout, ranks))
        return make(ranks, timeout, **others)

    def split_group(split_ranks, timeout, group_desc):
        called.append(("split", group_desc, timeout, split_ranks))
        return make(next(part for part in split_ranks if RANK in part))

    monkeypatch.setattr(dist, "new_group", new_group)
    monkeypatch.setattr(dist, "split_group", split_group)
    yield called
    dist.destroy_process_group()


def test_groups_on_a_gpu_are_split_at_once_from_the_communicator_of_all(calls):
    dist.group.WORLD.bound_device_id = torch.device("cuda", 0)
    mesh = build_mesh(torch.device("cpu"), ParallelConfig(tensor=4, pipeline=2), timedelta(seconds=77))
    # the data axis and `copies` are one group
    assert [(how, name, len(parts)) for how, name, _, parts in calls] == [
        ("split", "tensor", 16),
        ("split", "data", 8),
        ("split", "pipeline", 32),
        ("split", "model", 8),
    ]
    assert {timeout for _, _, timeout, _ in calls} == {timedelta(seconds=77)}
    for name, parts in ((name, parts) for _, name, _, parts in calls):
        assert sorted(rank for part in parts for rank in part) == list(range(RANKS))
        assert RANK in parts[next(index for index, part in enumerate(parts) if RANK in part)]
        assert getattr(mesh, name).size == len(parts[0])


def test_every_group_elsewhere_is_told_how_long_to_wait(calls):
    build_mesh(torch.device("cpu"), ParallelConfig(tensor=4), timedelta(seconds=77))
    assert {timeout for _, _, timeout, _ in calls} == {timedelta(seconds=77)}


def test_all_ranks_are_the_default_group(calls):
    mesh = build_mesh(torch.device("cpu"), ParallelConfig())
    assert mesh.data.group is mesh.copies.group is dist.group.WORLD
    assert [len(part) for _, _, _, part in calls] == [1] * RANKS  # one for tensor, pipeline and model


def test_a_rank_may_be_in_no_part(calls):
    assert group_of([[0, 1], [2, 3]], "pair") is None
    assert group_of([[20, 21], [2, 3]], "pair").size() == 2
    made = [ranks for _, _, _, ranks in calls if RANK in ranks]
    assert made == [list(range(4, RANKS)), [20, 21]]  # one each time, as every other rank
