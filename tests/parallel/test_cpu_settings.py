"""Threads of a process that computes on a CPU."""

import pytest
import torch
import torch.distributed as dist

from megatron_ponder.parallel import cpu_settings
from megatron_ponder.parallel.cpu_settings import announce_cores, prepare_cpu, share_cores


@pytest.mark.parametrize(("variable", "threads"), [("2,1", 2), (" 3 ", 3), ("", None), (",4", None)])
def test_threads_are_the_first_number_of_a_list(monkeypatch, variable, threads):
    before = torch.get_num_threads()
    monkeypatch.setenv("OMP_NUM_THREADS", variable)
    try:
        prepare_cpu()
        assert torch.get_num_threads() == (threads or before)
    finally:
        torch.set_num_threads(before)
        torch.set_flush_denormal(False)


@pytest.mark.parametrize(("variable", "threads"), [(None, (4, 4, 3)), ("5", (1, 1, 1))], ids=["unset", "set"])
def test_ranks_divide_the_cores_that_they_share(monkeypatch, variable, threads):
    """Two ranks that may use the same eight, and one that is bound to three of its own."""
    store, before = dist.HashStore(), torch.get_num_threads()
    monkeypatch.delenv("OMP_NUM_THREADS")
    if variable is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", variable)
    cores, keys = [set(range(8)), set(range(8)), {8, 9, 10}], []
    try:
        for own in cores:
            monkeypatch.setattr(cpu_settings, "_cores", lambda own=own: own)
            keys.append(announce_cores(store))
        for own, key, want in zip(cores, keys, threads, strict=True):
            monkeypatch.setattr(cpu_settings, "_cores", lambda own=own: own)
            torch.set_num_threads(1)
            share_cores(store, key)
            assert torch.get_num_threads() == want
    finally:
        torch.set_num_threads(before)
