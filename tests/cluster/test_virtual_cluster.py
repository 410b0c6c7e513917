"""The virtual cluster is what tests on it take it for."""

import pytest

from tests.cluster.virtual_cluster import wait_for

pytestmark = pytest.mark.cluster


def test_nodes_are_machines_of_their_own(cluster):
    show = "echo $(hostname) $(ip -4 -o addr show eth0 | grep -o '10[.0-9]*' | head -n 1) $CUDA_VISIBLE_DEVICES"
    said = cluster.run("srun", "-N2", "--gpus-per-node=2", "bash", "-c", show)
    assert sorted(said.split("\n"))[-2:] == ["node1 10.99.77.1 0,1", "node2 10.99.77.2 0,1"]
    listening = "python3 -c 'import socket; s = socket.create_server((\"127.0.0.1\", 5555)); s.accept()'"
    cluster.run("bash", "-c", f"({listening} >/dev/null 2>&1 &)", node=1)
    connect = "import socket; socket.create_connection(('127.0.0.1', 5555), timeout=5)"
    assert "ConnectionRefusedError" in cluster.run("python3", "-c", connect, node=2, check=False)
    wait_for(lambda: not cluster.run("python3", "-c", connect, node=1, check=False), 10, lambda: "a listener")


def test_what_a_job_leaves_behind_is_seen(cluster):
    cluster.run("bash", "-c", "(sleep 10 >/dev/null 2>&1 &)", node=2)
    seen = lambda: [(left.command, cluster.node_of(left)) for left in cluster.processes()]
    wait_for(lambda: seen() == [("sleep 10", 2)], 9, lambda: f"sleep 10 on node 2, and there is {seen()}")
    wait_for(lambda: seen() == [], 20, lambda: "its end")


def test_processes_end_with_their_job(cluster, tmp_path):
    job = cluster.submit("-N2", "-o", tmp_path / "log", "--wrap", "srun bash -c 'sleep 100 & exec sleep 100'")
    wait_for(lambda: sum(p.command == "sleep 100" for p in cluster.processes()) == 4, 20, lambda: "four processes")
    cluster.run("scancel", str(job))
    cluster.wait(job)
