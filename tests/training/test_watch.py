"""Measurements of a step, and slow ranks found among real ones."""

import re
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron_ponder.cluster.gpus import GPUS, known_gpu
from megatron_ponder.estimates.flops import training_flops
from megatron_ponder.model.ponder import PonderLM
from megatron_ponder.parallel.mesh import Mesh
from megatron_ponder.runs.metrics import read_metrics
from megatron_ponder.training.watch import MEASURED, PARTS, RankTime, StepWatch, Stragglers, slow_ranks
from tests.distributed import run_distributed
from tests.finished_runs import finished_runs
from tests.models import random_tokens, small_config


def watched(**overrides) -> tuple[StepWatch, PonderLM]:
    config = small_config(training__global_batch_size=4, ponder__jacobi_iterations=2, **overrides)
    model = PonderLM(config.model, config.ponder)
    return StepWatch(config, Mesh(), model.transformer), model


def test_the_parts_of_a_step_are_where_the_time_went():
    watch, model = watched()
    began = time.perf_counter()
    watch.begin()
    time.sleep(0.03)
    watch.mark()
    with watch.aside(), torch.no_grad():
        time.sleep(0.2)
        model.jacobi(random_tokens(1, 64), 2, model.pruning(hard=False))
    time.sleep(0.06)
    with torch.no_grad():
        model.jacobi(random_tokens(1, 64), 2, model.pruning(hard=False))
    watch.mark()
    time.sleep(0.01)
    watch.mark()
    fields, slow = watch.end(2)
    assert slow is None
    least = {"data": 0.03, "forward_backward": 0.06, "optimizer": 0.01}
    assert all(fields[f"{part}_seconds"] >= seconds for part, seconds in least.items())
    assert sum(fields[f"{part}_seconds"] for part in PARTS) <= fields["step_seconds"]
    assert fields["step_seconds"] <= time.perf_counter() - began - 0.2
    assert fields["data_wait"] == fields["data_seconds"] / fields["step_seconds"]
    assert fields["tokens_per_second"] == 4 * 64 / fields["step_seconds"]
    assert fields["slots_per_second"] == pytest.approx(12 * fields["tokens_per_second"])  # 1 + 2 + 3 × 3
    config = small_config(training__global_batch_size=4)
    assert fields["model_flops"] == training_flops(config, 2)
    assert fields["model_flops_per_second"] * fields["step_seconds"] == pytest.approx(fields["model_flops"])
    assert "mfu" not in fields  # of a CPU
    assert 0.05 < fields["memory_resident"] < 100
    assert fields.keys() - {"model_flops"} <= MEASURED
    assert 0 < sum(end - start for start, end in watch._forwards) < fields["forward_backward_seconds"]
    assert len(watch._forwards) == 5  # passes


def test_every_field_of_a_record_is_documented(corpus):
    text = (Path(__file__).parents[2] / "docs" / "training.md").read_text(encoding="utf-8")
    table = text.split("### Fields of `metrics.jsonl`")[1].split("\n\n")[1]
    documented = set(re.findall(r"^\| `(\w+)` \| \S", table, re.MULTILINE))
    records = read_metrics(finished_runs(corpus).whole)
    elsewhere = {"mfu", "memory_allocated", "memory_reserved", "slowest_rank", "slowest_over_median"}
    elsewhere |= {"skipped", "loss_spike"}
    assert {key for record in records for key in record} == documented - elsewhere


def test_names_that_cuda_reports():
    for name, key in {
        "NVIDIA H100 80GB HBM3": "H100-SXM",
        "NVIDIA H100 PCIe": "H100-PCIe",
        "NVIDIA A100-SXM4-80GB": "A100-80GB",
        "NVIDIA A100-SXM4-40GB": "A100-40GB",
        "NVIDIA A100 80GB PCIe": "A100-PCIe",
        "Tesla V100-SXM2-32GB": "V100",
        "NVIDIA GeForce RTX 4090": "RTX-4090",
        "NVIDIA H200": "H200",
        "NVIDIA B200": "B200",
    }.items():
        assert known_gpu(name) is GPUS[key]
    for unknown in ("NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA H100 80GB HBM3 MIG 1g.10gb", "Some NPU"):
        assert known_gpu(unknown) is None
    assert GPUS["H100-SXM"].peak("bf16") == 989e12
    assert GPUS["V100"].peak("bf16") is None
    assert GPUS["V100"].peak("fp32") == 15.7e12


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
