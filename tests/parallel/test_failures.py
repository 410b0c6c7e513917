"""A rank that fails ends the others within seconds, whatever they are doing, with one traceback."""

import subprocess
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron_ponder.base.errors import UserError, command
from megatron_ponder.base.launch import discover
from megatron_ponder.parallel.collectives import together
from megatron_ponder.parallel.process_group import process_group
from tests.processes import Forked, environments

SECONDS = 60


@command
def fail(words: list[str]) -> None:
    """The program of a rank: one fails, one waits for all, one for a message, one as NCCL does, in silence."""
    (failing, kind), launch = words, discover()
    with process_group(launch):
        dist.barrier()
        others = [rank for rank in range(launch.world_size) if rank != int(failing)]
        if launch.rank == int(failing):
            if kind == "bug":
                raise ArithmeticError("the sky is\nfalling")
            raise UserError("this rank's disk is full; make room")
        if launch.rank == others[0]:
            dist.all_reduce(torch.ones(1))
        elif launch.rank == others[1]:
            dist.recv(torch.ones(1), src=int(failing))
        time.sleep(600)


@command
def agree(words: list[str]) -> None:
    """The program of a rank: all of them end for what one has found."""

    def check() -> None:
        if dist.get_rank() == 1:
            raise UserError("model.x is wrong; set it to 3")

    with process_group(discover()):
        together(check)


def ended(program, words: list[str], ranks: int, folder: Path) -> tuple[list[int], list[str], float]:
    """Exit codes and outputs of ranks, and the seconds that they took."""
    start, processes = time.monotonic(), []
    for rank, env in enumerate(environments(ranks)):
        with (folder / f"rank-{rank}").open("w") as output:
            streams = {"stdout": output, "stderr": subprocess.STDOUT}
            processes.append(Forked(*words, program=program, env=env, **streams))
    try:
        codes = [process.wait(SECONDS) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return codes, [(folder / f"rank-{rank}").read_text() for rank in range(ranks)], time.monotonic() - start


@pytest.mark.parametrize("failing", [0, 3], ids=["first", "last"])
def test_a_rank_that_raises_ends_all_with_one_traceback(tmp_path, failing):
    codes, outputs, _ = ended(fail, [failing, "bug"], 4, tmp_path)
    assert codes == [1, 1, 1, 1]
    own = outputs.pop(failing)
    assert own.count("Traceback") == 1
    assert own.rstrip().endswith("ArithmeticError: the sky is\nfalling")
    for output in outputs:
        assert "Traceback" not in output
        assert f": ended, because rank {failing} failed: ArithmeticError: the sky is falling\n" in output


def test_what_a_user_can_mend_is_one_line_on_the_rank_that_has_it(tmp_path):
    codes, outputs, _ = ended(fail, [1, "full"], 3, tmp_path)
    assert codes == [2, 2, 2]
    assert "rank 1: error: this rank's disk is full; make room\n" in outputs[1]
    assert all("failed: UserError: this rank's disk is full" in outputs[rank] for rank in (0, 2))
    assert not any("Traceback" in output for output in outputs)


def test_what_all_ranks_agree_on_ends_them_in_order(tmp_path):
    codes, outputs, _ = ended(agree, [], 2, tmp_path)
    assert codes == [2, 2]
    assert outputs == ["error: model.x is wrong; set it to 3\n", ""]
