"""Process groups of real ranks, and what is said when ranks do not find each other."""

import os
import re
import socket
import time

import pytest
import torch
import torch.distributed as dist

from megatron_ponder.base.errors import UserError
from megatron_ponder.base.launch import Launch
from megatron_ponder.parallel.process_group import process_group
from tests.distributed import RankError, run_distributed
from tests.processes import free_port, script


def join(launch: Launch, patience: float) -> str:
    """What is said when ranks do not meet."""
    with pytest.raises(UserError) as caught, process_group(launch, patience=patience):
        pass
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("address", ["127.0.0.1", "no-such-host.invalid"])
def test_a_wrong_master_address_is_named_in_time(address):
    start = time.monotonic()
    port = free_port()
    message = join(Launch(rank=3, world_size=4, address=address, port=port), 1.0)
    assert re.match(
        rf"rank 3 has not reached rank 0 at {address}:{port} within 1 seconds \(.+\); set MASTER_ADDR", message
    )
    assert time.monotonic() - start < 20


def test_rank_0_waits_for_the_others_no_longer_than_it_is_told():
    message = join(Launch(world_size=2, port=free_port()), 1.0)
    assert "not all 2 ranks have come to 127.0.0.1:" in message


def test_a_port_in_use_is_named():
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = other.getsockname()[1]
        assert f"port {port} on " in (message := join(Launch(world_size=2, port=port), 1.0))
        assert "is in use by another program" in message


@pytest.mark.parametrize("variable", ["all", "0", "-2", "1.5", "9999999999"])
def test_threads_that_are_no_number_are_refused_before_ranks_meet(monkeypatch, variable):
    before = torch.get_num_threads()
    monkeypatch.setenv("OMP_NUM_THREADS", variable)
    try:
        assert f'OMP_NUM_THREADS is "{variable}", not a number from 1 to 4096; set it to one' in join(Launch(), 1.0)
    finally:
        torch.set_num_threads(before)


FOREIGN = """
import sys
from megatron_ponder.base.launch import Launch
from megatron_ponder.parallel import rendezvous
from megatron_ponder.parallel.process_group import process_group
rendezvous.SECONDS_TO_ANSWER = 1.0
with process_group(Launch(rank=1, world_size=2, port=int(sys.argv[1])), patience=1.0):
    pass
"""


def test_a_program_that_is_no_rank_but_answers_is_given_up():
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        done = script(FOREIGN, other.getsockname()[1])
    assert done.returncode == 2
    assert "rank 1: error: not all 2 ranks have come to" in done.stderr


def describe_group(mesh):
    """What a rank sees of its process group."""
    total = torch.tensor([1.0 + dist.get_rank()])
    dist.all_reduce(total)
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE", "MASTER_ADDR")
    return {
        "backend": dist.get_backend(),
        "rank": (dist.get_rank(), dist.get_world_size()),
        "sum": total.item(),
        "device": mesh.device.type,
        "data": (mesh.data.rank, mesh.data.size),
        "tensor": (mesh.tensor.rank, mesh.tensor.size),
        "environ": [os.environ[name] for name in names],
        "denormal": (torch.tensor([1e-30]) * 1e-10).item(),
        "threads": torch.get_num_threads(),
    }


def test_process_group_of_two_ranks():
    for rank, seen in enumerate(run_distributed(describe_group, 2)):
        assert seen == {
            "backend": "gloo",
            "rank": (rank, 2),
            "sum": 3.0,
            "device": "cpu",
            "data": (rank, 2),
            "tensor": (0, 1),
            "environ": [str(rank), "2", str(rank), "2", "127.0.0.1"],
            "denormal": 0.0,
            "threads": 1,
        }


ONE_RANK = """
import os
import torch.distributed as dist
from megatron_ponder.base.launch import discover
from megatron_ponder.parallel.process_group import process_group
try:
    with process_group(discover({})) as device:
        assert dist.get_world_size() == 1 and device.type == "cpu"
        assert os.environ["OMPI_COMM_WORLD_LOCAL_RANK"] == "0"  # where Open MPI counts in another order
        raise KeyError("the body's own error")
except KeyError:
    assert "RANK" not in os.environ and os.environ["OMPI_COMM_WORLD_LOCAL_RANK"] == "3"
    assert not dist.is_initialized()
    print("left")
"""


def test_process_group_ends_when_its_body_fails():
    done = script(ONE_RANK, env=os.environ | {"OMPI_COMM_WORLD_LOCAL_RANK": "3"})
    assert done.stdout == "left\n", done.stderr


def fail_on_the_second_rank(mesh):
    if dist.get_rank() == 1:
        time.sleep(0.2)
        raise LookupError("the cause")
    dist.barrier()


def never_meet(mesh):
    if dist.get_rank() == 0:
        dist.barrier()
    time.sleep(60)


def test_run_distributed_reports_the_first_failure():
    with pytest.raises(RankError, match=r"(?s)^rank 1\n.*fail_on_the_second_rank.*LookupError: the cause"):
        run_distributed(fail_on_the_second_rank, 2)


def test_run_distributed_has_a_time_limit():
    start = time.monotonic()
    with pytest.raises(TimeoutError, match="never_meet on 2 ranks"):
        run_distributed(never_meet, 2, time_limit=5)
    assert time.monotonic() - start < 20
