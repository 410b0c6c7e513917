"""A run whose batch grows: what a step is, what is told of it, and where it goes on after it was stopped."""

from megatron_ponder.runs.metrics import read_metrics
from megatron_ponder.runs.status import run_status
from tests.distributed import run_distributed
from tests.finished_runs import tiny_arguments, train_in_turn
from tests.training.test_resume import assert_same_run

RAMP = {
    "training__batch_size_ramp": "2 2 12",
    "training__global_batch_size": 8,
    "training__micro_batch_size": 1,
    "training__eval_interval": 0,
    "checkpoint__interval": 3,
    "optimizer__schedule": "constant",
    "logging__own_losses_interval": 0,
    "ponder_training__latent_start": 4,
}
SIZES = [2, 2, 4, 4, 8, 8, 8, 8]  # 6 begins at sample 8, and the step before it ends at 12, where 8 begins


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
    assert [record["samples"] for record in records] == consumed
    assert [sum(record["latent_step_histogram"]) / 16 for record in records] == SIZES
    for size, record in zip(SIZES, records, strict=True):
        assert abs(record["tokens_per_second"] * record["step_seconds"] - 16 * size) < 1e-6
    # what is left is told in steps that cost as much as the last: 32 sequences of 8 a step when latent steps have begun
    assert [record["steps_left"] for record in records[4:]] == [3, 2, 1, 0]
    ratio = records[3]["steps_left"] * 4 / 32
    assert ratio > 5
    assert abs(records[0]["steps_left"] - (2 + 4 + 4 + 32 * ratio) / 2) < 1e-9
    assert abs(records[4]["model_flops"] / records[3]["model_flops"] - 2 * ratio) < 0.3 * ratio  # R is drawn
    log = (whole / "train.log").read_text(encoding="utf-8")
    assert "samples of 16 tokens an epoch, 2 to 8 a step" in log
    assert "step 2  from here a step is 4 sequences" in log
    assert "step 4  from here a step is 8 sequences" in log
    status = run_status(whole)
    span = records[-1]["time"] - records[0]["time"]
    assert abs(status.tokens_per_second / ((consumed[-1] - 2) * 16 / span) - 1) < 1e-9
    _without_steps_left(whole, 3)
    _without_steps_left(broken, 3)
    assert_same_run(broken, whole)


def _without_steps_left(run_dir, count: int) -> None:
    """Take a field that depends on how long a run was to be, out of the first records."""
    import json

    path = run_dir / "metrics.jsonl"
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    for record in records[:count]:
        del record["steps_left"]
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
