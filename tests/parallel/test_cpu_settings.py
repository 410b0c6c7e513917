"""Threads of a process that computes on a CPU."""

import pytest
import torch

from megatron_ponder.parallel.cpu_settings import prepare_cpu


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
