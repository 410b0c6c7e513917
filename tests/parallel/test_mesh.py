"""The grid of ranks: who is whose neighbour along which axis."""

from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from megatron_ponder.config import ParallelConfig
from megatron_ponder.config.layout import GROUPS, RARE
from megatron_ponder.parallel.groups import COLLECTIVE_TIMEOUT, host_group
from megatron_ponder.parallel.mesh import Axis, Mesh, build_mesh
from tests.distributed import run_distributed


def neighbours(mesh: Mesh) -> dict[str, list[int]]:
    """Global ranks along each axis, in the axis' own order."""
    groups = {}
    for name in GROUPS:
        axis = getattr(mesh, name)
        if axis.group is None:  # a context rank alone has none
            continue
        groups[name] = dist.get_process_group_ranks(axis.group)
        assert len(groups[name]) == axis.size
        assert groups[name][axis.rank] == dist.get_rank()
    return groups


def seconds(group: dist.ProcessGroup) -> float:
    """That a collective of a group waits for a rank that does not come."""
    return group._get_backend(torch.device("cpu")).options._timeout.total_seconds()


def four_ranks(mesh: Mesh) -> tuple[dict[str, list[int]], dict[str, float], set[str]]:
    """Who is whose neighbour; and of a grid that waits for ten minutes how long, and which names share a group."""
    patient = build_mesh(mesh.device, ParallelConfig(tensor=2), timedelta(minutes=10))
    groups = {name: getattr(patient, name).group for name in GROUPS if name not in RARE}
    waits = {name: seconds(group) for name, group in groups.items()}
    alike = {name for name, group in groups.items() if group is patient.tensor.group}
    assert patient.copies.group is patient.data.group
    assert seconds(host_group()) == COLLECTIVE_TIMEOUT.total_seconds()
    return neighbours(mesh), waits, alike


def test_four_ranks_of_two_tensor_and_two_pipeline_ranks():
    results = run_distributed(four_ranks, 4, tensor=2, pipeline=2)
    assert [found for found, *_ in results] == [
        {"tensor": [0, 1], "data": [0], "pipeline": [0, 2], "model": [0, 1, 2, 3], "copies": [0]},
        {"tensor": [0, 1], "data": [1], "pipeline": [1, 3], "model": [0, 1, 2, 3], "copies": [1]},
        {"tensor": [2, 3], "data": [2], "pipeline": [0, 2], "model": [0, 1, 2, 3], "copies": [2]},
        {"tensor": [2, 3], "data": [3], "pipeline": [1, 3], "model": [0, 1, 2, 3], "copies": [3]},
    ]
    for _, waits, alike in results:
        assert waits == dict.fromkeys(set(GROUPS) - set(RARE), 600.0)
        assert alike == {"tensor", "model"}


@pytest.mark.slow
def test_eight_ranks_have_two_along_every_axis():
    """Tensor ranks are nearest, then data ranks, then pipeline ranks; a copy of the model is one data rank's."""
    for rank, groups in enumerate(run_distributed(neighbours, 8, tensor=2, pipeline=2)):
        first = {"tensor": rank & ~1, "data": rank & ~2, "pipeline": rank & ~4}
        apart = {"tensor": 1, "data": 2, "pipeline": 4}
        assert {name: groups[name] for name in apart} == {
            name: [first[name], first[name] + apart[name]] for name in apart
        }
        assert groups["model"] == [base + (rank & 2) for base in (0, 1, 4, 5)]
        assert groups["copies"] == groups["data"]


def test_an_axis_that_there_is_not_is_no_argument():
    with pytest.raises(AssertionError, match=r"no axis is called {'tensr'}"):
        Mesh(tensr=Axis(2))


@pytest.mark.parametrize(("tokens", "share"), [(1, 1), (2, 1), (3, 1), (4, 2), (6, 2), (7, 3)])
def test_share_of_tokens_is_rounded_up_where_they_are_split(tokens, share):
    assert Axis(3, sequence_parallel=True).share(tokens) == share
    assert Axis(3).share(tokens) == tokens
