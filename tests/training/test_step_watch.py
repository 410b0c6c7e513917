"""Measurements of a step."""

import re
import time

import pytest
import torch

from megatron_ponder.cluster.gpus import GPUS, known_gpu
from megatron_ponder.model.ponder import PonderLM
from megatron_ponder.parallel.mesh import Mesh
from megatron_ponder.runs.metrics import read_metrics
from megatron_ponder.training.step_watch import MEASURED, PARTS, StepWatch
from tests import REPOSITORY
from tests.finished_runs import finished_runs
from tests.models import random_tokens, small_config


def watched(**overrides) -> tuple[StepWatch, PonderLM]:
    config = small_config(training__global_batch_size=4, ponder_training__jacobi_iterations=2, **overrides)
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
        model.jacobi(random_tokens(1, 64), 2, model.rule("soft"))
    time.sleep(0.06)
    with torch.no_grad():
        model.jacobi(random_tokens(1, 64), 2, model.rule("soft"))
    watch.mark()
    time.sleep(0.01)
    watch.mark()
    fields, slow = watch.end(1e9, 4 * 64 * 12, 4 * 64)
    assert slow is None
    least = {"data": 0.03, "forward_backward": 0.06, "optimizer": 0.01}
    assert all(fields[f"{part}_seconds"] >= seconds for part, seconds in least.items())
    assert sum(fields[f"{part}_seconds"] for part in PARTS) <= fields["step_seconds"]
    assert fields["step_seconds"] <= time.perf_counter() - began - 0.2
    assert fields["data_wait"] == fields["data_seconds"] / fields["step_seconds"]
    assert fields["tokens_per_second"] == 4 * 64 / fields["step_seconds"]
    assert fields["slots_per_second"] == pytest.approx(12 * fields["tokens_per_second"])
    assert fields["model_flops"] == 1e9
    assert fields["model_flops_per_second"] * fields["step_seconds"] == pytest.approx(fields["model_flops"])
    assert "mfu" not in fields  # of a CPU
    assert 0.05 < fields["memory_resident"] < 100
    assert fields.keys() - {"model_flops"} <= MEASURED
    assert 0 < sum(end - start for start, end in watch._forwards) < fields["forward_backward_seconds"]
    assert len(watch._forwards) == 5  # passes


def test_every_field_of_a_record_is_documented(corpus):
    text = (REPOSITORY / "docs" / "training.md").read_text(encoding="utf-8")
    table = text.split("### Fields of `metrics.jsonl`")[1].split("\n\n")[1]
    documented = set(re.findall(r"^\| `(\w+)` \| \S", table, re.MULTILINE))
    records = read_metrics(finished_runs(corpus).whole)
    elsewhere = {"mfu", "memory_allocated", "memory_reserved", "slowest_rank", "slowest_over_median"}
    elsewhere |= {"latent_scale", "skipped", "loss_spike", "replica_drift"}
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
