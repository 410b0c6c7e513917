"""Ranks that hold the others up are found and named."""

import time

import pytest
import torch
import torch.distributed as dist

from megatron_ponder.parallel.mesh import Mesh
from megatron_ponder.training.stragglers import RankTime, Stragglers, slow_ranks
from tests.distributed import run_distributed


def slow_steps(mesh: Mesh) -> tuple[list, list, str | None]:
    """Six steps of which rank 1 needs three times the others' time, and what is held up by saying so."""
    stragglers = Stragglers(2, 1.5, 1.0, mesh.device)
    results, held = [], []
    for step in range(1, 7):
        if dist.get_rank() == 0:
            time.sleep(2.0 * (step == 4))  # it comes late to the gather after step 4, for which nobody may wait
        begun = time.perf_counter()
        results.append(stragglers.add(0.001, 0.3 if dist.get_rank() == 1 else 0.1))
        held.append(time.perf_counter() - begun)
        dist.barrier()  # as a step's own collectives
    last = stragglers.finish()
    return results, held, stragglers.report(last)


def test_a_slow_rank_is_found_without_holding_a_step():
    ranks = run_distributed(slow_steps, 3)
    for results, held, report in ranks:
        assert [times is not None for times in results] == [False, False, True, False, True, False]
        assert results[2] == [RankTime(0.001, pytest.approx(seconds)) for seconds in (0.1, 0.3, 0.1)]
        assert held[3] < 1.0  # the gather is under way, and the last rank not there yet
        head, columns, *rows = report.splitlines()
        assert head.startswith("1 of 3 ranks slower than 1.5 × the median, 0.101 s a step of their own over 2 steps")
        assert columns.split()[:2] == ["rank", "host"]
        assert len(rows) == 1
        assert rows[0].split()[0] == "1"
        assert rows[0].split()[-1] == "2.98"


def test_one_process_has_nobody_to_wait_for():
    stragglers = Stragglers(1, 1.3, 1.0, torch.device("cpu"))
    assert [stragglers.add(1.0, 1.0) for _ in range(3)] == [None] * 3
    assert stragglers.finish() is None


def test_ranks_of_one_pace_are_not_reported():
    assert slow_ranks([RankTime(0.0, 1.0), RankTime(0.1, 1.1)], ["a", "b"], 1.3, 100) is None


def test_data_that_come_late_count_as_well_and_the_slowest_are_named_first():
    times = [RankTime(0.0, 1.0)] * 5 + [RankTime(0.5, 1.0), RankTime(0.0, 4.0)]
    *_, first, second = slow_ranks(times, [f"node{rank}" for rank in range(7)], 1.3, 100).splitlines()
    assert first.split() == ["6", "node6", "0.000", "4.000", "4.00"]
    assert second.split() == ["5", "node5", "0.500", "1.000", "1.50"]
    assert len(slow_ranks(times, [""] * 7, 1.3, 100, most=1).splitlines()) == 3
