"""Rank discovery under each launcher."""

import sys

import pytest

from megatron_ponder.base.errors import UserError
from megatron_ponder.base.launch import Launch, discover

TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "node7",
    "MASTER_PORT": "1234",
}
SLURM = {
    "SLURM_JOB_ID": "4000012",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "11",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2),3",
    "SLURM_STEP_NODELIST": "gpu[007-008],login1",
    "SLURM_PROCID": "9",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "2",
}


@pytest.fixture
def no_scontrol(monkeypatch, tmp_path):
    """A machine without SLURM's commands."""
    monkeypatch.setenv("PATH", str(tmp_path))


def test_torchrun():
    expected = Launch(rank=5, world_size=8, local_rank=1, local_size=4, address="node7", port=1234, source="torchrun")
    assert discover(TORCHRUN) == expected


def test_torchrun_variables_set_by_hand():
    environ = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "29501"}
    assert discover(environ) == Launch(1, 2, 1, 2, "localhost", 29501, "torchrun")
    assert discover(environ | {"LOCAL_SIZE": "1", "LOCAL_RANK": "0"}).local_size == 1


@pytest.mark.parametrize("missing", ["MASTER_ADDR", "MASTER_PORT"])
def test_torchrun_without_a_meeting_point_is_refused(missing):
    environ = {key: value for key, value in TORCHRUN.items() if key != missing}
    with pytest.raises(UserError, match="without MASTER_ADDR and MASTER_PORT; use torchrun or set all four"):
        discover(environ)


def test_one_torchrun_rank_needs_no_meeting_point():
    launch = discover({"RANK": "0", "WORLD_SIZE": "1"})
    assert (launch.world_size, launch.address) == (1, "127.0.0.1")
    assert launch.port > 0


@pytest.mark.usefixtures("no_scontrol")
def test_slurm():
    launch = discover(SLURM)
    assert (launch.rank, launch.world_size, launch.local_rank, launch.source) == (9, 11, 1, "slurm")
    assert launch.address == "gpu007"
    assert launch.port == discover(SLURM | {"SLURM_PROCID": "0", "SLURM_NODEID": "0"}).port
    assert launch.port != discover(SLURM | {"SLURM_JOB_ID": "4000013"}).port
    assert 1024 < launch.port < 65536


@pytest.mark.usefixtures("no_scontrol")
@pytest.mark.parametrize(
    ("compressed", "counts"),
    [("4(x2),3", [4, 4, 3]), ("8", [8]), ("1(x3)", [1, 1, 1]), ("2,12(x2),1", [2, 12, 12, 1]), ("16(x10)", [16] * 10)],
)
def test_slurm_tasks_on_each_node(compressed, counts):
    for node, count in enumerate(counts):
        environ = SLURM | {"SLURM_STEP_TASKS_PER_NODE": compressed, "SLURM_NODEID": str(node), "SLURM_LOCALID": "0"}
        environ |= {"SLURM_STEP_NUM_TASKS": str(sum(counts)), "SLURM_PROCID": "0"}
        assert discover(environ).local_size == count


@pytest.mark.usefixtures("no_scontrol")
def test_slurm_takes_a_given_meeting_point():
    launch = discover(SLURM | {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "4321"})
    assert (launch.address, launch.port) == ("10.0.0.1", 4321)


TASKS = r'SLURM_STEP_TASKS_PER_NODE is ".*", which says nothing of node 2 \(SLURM_NODEID\); leave both to srun'


@pytest.mark.usefixtures("no_scontrol")
@pytest.mark.parametrize(
    ("environ", "message"),
    [
        # in a pod of Kubernetes beside a service called "master"
        (TORCHRUN | {"MASTER_PORT": "tcp://10.0.0.1:29500"}, r'MASTER_PORT is "tcp://10.*", not a number.*Kubernetes'),
        (
            TORCHRUN | {"MASTER_ADDR": "tcp://10.0.0.1"},
            r'MASTER_ADDR is "tcp://10\.0\.0\.1", not a host name or',
        ),
        (TORCHRUN | {"MASTER_PORT": "70000"}, 'MASTER_PORT is "70000", not a number from 0 to 65535; set it to one'),
        (TORCHRUN | {"RANK": "five"}, 'RANK is "five", not a number from 0'),
        (TORCHRUN | {"RANK": "-1"}, 'RANK is "-1", not a number from 0'),
        (TORCHRUN | {"WORLD_SIZE": "0"}, 'WORLD_SIZE is "0", not a number from 1'),
        (TORCHRUN | {"WORLD_SIZE": "4"}, "rank 5 is not one of 4 ranks, which count from 0; leave RANK, WORLD_SIZE"),
        (TORCHRUN | {"LOCAL_RANK": "4"}, "local rank 4 is not one of the 4 on this node, counted from 0; leave RANK"),
        (TORCHRUN | {"LOCAL_WORLD_SIZE": "9"}, "9 ranks on this node are more than the 8 in all; leave RANK"),
        (TORCHRUN | {"LOCAL_RANK": "1.0"}, 'LOCAL_RANK is "1.0", not a number'),
        ({"RANK": "1"}, "RANK is set and WORLD_SIZE is not; use a launcher, set both, or unset RANK for one process"),
        ({"RANK": " ", "WORLD_SIZE": "2"}, "WORLD_SIZE is set and RANK is not"),
        (SLURM | {"SLURM_STEP_NUM_TASKS": "many"}, 'SLURM_STEP_NUM_TASKS is "many", not a number from 1'),
        (SLURM | {"SLURM_PROCID": "x"}, 'SLURM_PROCID is "x", not a number'),
        (SLURM | {"SLURM_PROCID": "11"}, "rank 11 is not one of 11 ranks, which count from 0; leave SLURM_PROCID"),
        (SLURM | {"SLURM_JOB_ID": "4_1"}, 'SLURM_JOB_ID is "4_1", not a number'),
        (SLURM | {"SLURM_STEP_NODELIST": " "}, "in a SLURM job step, but SLURM_STEP_NODELIST is not set"),
        (SLURM | {"SLURM_STEP_NODELIST": "[]"}, r'SLURM_STEP_NODELIST is "\[\]", which names no host'),
        (SLURM | {"SLURM_STEP_TASKS_PER_NODE": "4(x2"}, TASKS),
        (SLURM | {"SLURM_STEP_TASKS_PER_NODE": "4(x2)"}, TASKS),  # two nodes, and this is the third
        (SLURM | {"SLURM_STEP_TASKS_PER_NODE": "4,x,3"}, TASKS),
        ({"OMPI_COMM_WORLD_SIZE": "2x"}, 'OMPI_COMM_WORLD_SIZE is "2x", not a number from 1'),
        ({"PMI_SIZE": "-2"}, 'PMI_SIZE is "-2", not a number from 1'),
    ],
)
def test_what_no_launcher_means_is_refused_in_one_line(environ, message):
    with pytest.raises(UserError, match=message) as caught:
        discover(environ)
    assert "\n" not in str(caught.value)


def test_an_empty_variable_is_not_set():
    empty = {"RANK": "", "WORLD_SIZE": " ", "SLURM_STEP_ID": "", "OMPI_COMM_WORLD_SIZE": "", "MASTER_PORT": ""}
    assert discover(empty).source == "single"
    launch = discover({"RANK": "0 ", "WORLD_SIZE": "1", "LOCAL_RANK": "", "MASTER_ADDR": "", "MASTER_PORT": " "})
    assert (launch.source, launch.local_rank, launch.address) == ("torchrun", 0, "127.0.0.1")
    assert 0 < launch.port < 65536
    with pytest.raises(UserError, match="without MASTER_ADDR and MASTER_PORT"):
        discover(TORCHRUN | {"MASTER_PORT": ""})


@pytest.mark.usefixtures("no_scontrol")
def test_incomplete_slurm_variables_are_named():
    with pytest.raises(UserError, match="in a SLURM job step, but SLURM_NODEID is not set"):
        discover({key: value for key, value in SLURM.items() if key != "SLURM_NODEID"})


def test_torchrun_under_slurm_is_torchrun():
    assert discover(SLURM | TORCHRUN).source == "torchrun"
    assert discover(SLURM | TORCHRUN).rank == 5


@pytest.mark.parametrize(
    "environ",
    [
        {},
        {key: value for key, value in SLURM.items() if "STEP" not in key} | {"SLURM_NTASKS": "11"},  # a batch script
        SLURM | {"SLURM_STEP_NUM_TASKS": "1"},  # a shell started by srun
        {"OMPI_COMM_WORLD_SIZE": "1"},
    ],
)
def test_a_plain_process_is_single(environ):
    launch = discover(environ)
    assert (launch.rank, launch.world_size, launch.local_size, launch.source) == (0, 1, 1, "single")
    assert launch.port > 0


@pytest.mark.parametrize("environ", [{"OMPI_COMM_WORLD_SIZE": "2"}, {"PMI_SIZE": "2"}])
def test_mpi_without_mpi4py_says_what_to_install(monkeypatch, environ):
    monkeypatch.setitem(sys.modules, "mpi4py", None)  # makes its import fail
    with pytest.raises(UserError, match=r"mpi4py is missing; pip install 'megatron_ponder\[mpi\]'"):
        discover(environ)


def test_mpi_without_its_library_says_where_to_name_it(monkeypatch, tmp_path):
    monkeypatch.setenv("MPI4PY_LIBMPI", str(tmp_path / "libmpi.so"))
    with pytest.raises(UserError, match=r"mpi4py finds no MPI library; name mpirun's own libmpi\.so in MPI4PY_LIBMPI"):
        discover({"OMPI_COMM_WORLD_SIZE": "2"})
