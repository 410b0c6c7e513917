"""Ranks agree on errors, and on who is whose neighbour."""

import pytest
import torch.distributed as dist

from megatron_ponder.base.errors import UserError
from megatron_ponder.parallel.collectives import together
from megatron_ponder.parallel.mesh import Mesh
from tests.distributed import run_distributed


def fail_with(errors: dict[int, Exception]) -> tuple[str, str, bool] | int:
    """What `together` does on this rank when the given ranks fail."""
    rank = dist.get_rank()

    def action() -> int:
        if rank in errors:
            raise errors[rank]
        return 10 + rank

    try:
        return together(action)
    except Exception as error:
        return type(error).__name__, str(error), getattr(error, "shared", False)


def agree(mesh: Mesh) -> dict:
    missing = FileNotFoundError(2, "No such file or directory", "data.bin")
    return {
        "none": fail_with({}),
        "one": fail_with({1: UserError("set x to 3")}),
        "both": fail_with({0: UserError("first"), 1: UserError("second")}),
        "system": fail_with({1: missing}),
        "again": fail_with({}),  # still in step with the others
    }


def test_an_error_of_one_rank_is_everyones():
    for rank, seen in enumerate(run_distributed(agree, 2)):
        assert seen == {
            "none": 10 + rank,
            "one": ("UserError", "set x to 3", True),
            "both": ("UserError", "first", True),
            "system": ("UserError", "No such file or directory (data.bin); check the path", True),
            "again": 10 + rank,
        }


def test_a_single_process_agrees_with_itself():
    def fail():
        raise UserError("set x to 3")

    assert together(lambda: 5) == 5
    with pytest.raises(UserError, match="set x to 3"):
        together(fail)
    with pytest.raises(ZeroDivisionError):  # a bug is not for users
        together(lambda: 1 / 0)
