"""The grid of ranks: who is whose neighbour along which axis."""

import pytest
import torch.distributed as dist

from megatron_ponder.parallel.mesh import Axis, Mesh
from tests.distributed import run_distributed

AXES = ("tensor", "data", "pipeline", "model")


def neighbours(mesh: Mesh) -> dict[str, list[int]]:
    """Global ranks along each axis, in the axis' own order."""
    groups = {}
    for name in AXES:
        axis = getattr(mesh, name)
        groups[name] = dist.get_process_group_ranks(axis.group)
        assert len(groups[name]) == axis.size
        assert groups[name][axis.rank] == dist.get_rank()
    return groups


def test_four_ranks_of_two_tensor_and_two_pipeline_ranks():
    assert run_distributed(neighbours, 4, tensor=2, pipeline=2) == [
        {"tensor": [0, 1], "data": [0], "pipeline": [0, 2], "model": [0, 1, 2, 3]},
        {"tensor": [0, 1], "data": [1], "pipeline": [1, 3], "model": [0, 1, 2, 3]},
        {"tensor": [2, 3], "data": [2], "pipeline": [0, 2], "model": [0, 1, 2, 3]},
        {"tensor": [2, 3], "data": [3], "pipeline": [1, 3], "model": [0, 1, 2, 3]},
    ]


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


@pytest.mark.parametrize(("tokens", "share"), [(1, 1), (2, 1), (3, 1), (4, 2), (6, 2), (7, 3)])
def test_share_of_tokens_is_rounded_up_where_they_are_split(tokens, share):
    assert Axis(3, sequence_parallel=True).share(tokens) == share
    assert Axis(3).share(tokens) == tokens
