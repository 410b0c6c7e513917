"""A run whose batch grows: what a step is, what is told of it, and where it goes on after it was stopped."""

import pytest
import torch

from megatron_ponder.runs.metrics import read_metrics
from megatron_ponder.runs.status import run_status
from tests.distributed import run_distributed
from tests.finished_runs import tiny_arguments, train_in_turn
from tests.training.test_branching import of_run
from tests.training.test_resume import final_state

RAMP = {
    "ponder__mode": "vanilla",
    "training__batch_size_ramp": "2 2 12",
    "training__global_batch_size": 8,
    "training__micro_batch_size": 1,
    "training__eval_interval": 0,
    "checkpoint__interval": 3,
    "optimizer__schedule": "constant",
}
SIZES = [2, 2, 4, 6, 8, 8, 8, 8]  # 4 from sample 4 on, 6 from 8, 8 from 12, each in the first step that begins there


def test_a_run_that_is_resumed_while_its_batch_grows_is_the_one_that_was_not_stopped(corpus, tmp_path):
    """On two data-parallel ranks, with a checkpoint in the middle of the ramp, bit for bit."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    commands = [
        tiny_arguments(corpus, whole, **RAMP),
        tiny_arguments(corpus, broken, **RAMP | {"training__steps": 3}),
        tiny_arguments(corpus, broken, **RAMP | {"checkpoint__resume": "auto"}),
    ]
    run_distributed(train_in_turn, 2, commands, time_limit=300)
    records = read_metrics(whole)
    consumed = [sum(SIZES[:count]) for count in range(1, 9)]
    assert [(record["samples"], record["tokens"]) for record in records] == [(count, 16 * count) for count in consumed]
    assert [sum(record["latent_step_histogram"]) for record in records] == [16 * size for size in SIZES]
    left = [(consumed[-1] - samples) / size for samples, size in zip(consumed, SIZES, strict=True)]
    assert [record["steps_left"] for record in records] == left
    for size, record in zip(SIZES, records, strict=True):
        assert record["tokens_per_second"] * record["step_seconds"] == pytest.approx(16 * size)
        assert record["model_flops"] == pytest.approx(records[-1]["model_flops"] * size / 8)
    log = (whole / "train.log").read_text(encoding="utf-8")
    assert "samples of 16 tokens an epoch, 2 to 8 a step" in log
    for step, size in ((2, 4), (3, 6), (4, 8)):
        assert f"step {step}  from here a step is {size} sequences" in log
    span = records[-1]["time"] - records[0]["time"]
    assert run_status(whole).tokens_per_second == pytest.approx((consumed[-1] - 2) * 16 / span)
    assert of_run(broken) == of_run(whole)
    want, got = final_state(whole), final_state(broken)
    assert want.keys() == got.keys()
    assert all(torch.equal(got[key], tensor) for key, tensor in want.items())
