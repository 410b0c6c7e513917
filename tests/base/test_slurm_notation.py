"""SLURM's short forms, with and without its own commands."""

import pytest

from megatron_ponder.base.slurm_notation import first_host


@pytest.fixture
def no_scontrol(monkeypatch, tmp_path):
    """A machine without SLURM's commands."""
    monkeypatch.setenv("PATH", str(tmp_path))


@pytest.mark.usefixtures("no_scontrol")
@pytest.mark.parametrize(
    ("node_list", "host"),
    [
        ("gpu[007-010,12],login1", "gpu007"),
        ("gpu[12,007-010]", "gpu12"),
        ("node1", "node1"),
        ("node1,node2", "node1"),
        ("a-b.c,d[1-2]", "a-b.c"),
        ("gpu[01-04]-ib,x", "gpu01-ib"),
        ("rack[2-3]node[10-12]", "rack2node10"),
    ],
)
def test_first_host_without_scontrol(node_list, host):
    assert first_host(node_list) == host


@pytest.mark.parametrize(("script", "host"), [("echo one; echo two", "one"), ("exit 1", "gpu1")])
def test_scontrol_expands_node_lists_where_it_works(monkeypatch, tmp_path, script, host):
    scontrol = tmp_path / "scontrol"
    scontrol.write_text(f"#!/bin/sh\n[ \"$*\" = 'show hostnames gpu[1-2]' ] || exit 3\n{script}\n")
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert first_host("gpu[1-2]") == host
