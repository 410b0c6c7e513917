"""A run that branches off from another one goes on with all that the other had, by a schedule of its own."""

from pathlib import Path

import pytest

from megatron_ponder.base.errors import UserError
from megatron_ponder.checkpoint.folders import CONFIG
from megatron_ponder.config import to_yaml
from megatron_ponder.training.resuming import find_resume, schedule_changed
from tests.distributed import run_distributed
from tests.finished_runs import LATEST, alone, finished_runs, tiny_arguments, train_in_turn
from tests.models import small_config
from tests.training.test_resume import assert_same_run, essentials

BARE = {"training__eval_interval": 0, "logging__own_losses_interval": 0, "optimizer__warmup_steps": 2}
DECAY = {"optimizer__schedule": "wsd", "optimizer__decay_steps": 3, "optimizer__decay_shape": "1-sqrt"}


def test_a_decay_that_branches_off_is_that_of_a_run_that_never_did(corpus, tmp_path):
    """Bit for bit: up to the branch, and with the same decay from there on, in losses, weights and moments."""
    whole, stable, branch = (tmp_path / name for name in ("whole", "stable", "branch"))
    begun = {"optimizer__schedule": "wsd", "optimizer__decay_steps": 0, "training__steps": 5}
    off = DECAY | {"checkpoint__branch_from": stable, "checkpoint__resume": "auto"}
    commands = [
        tiny_arguments(corpus, whole, **BARE, **DECAY),
        tiny_arguments(corpus, stable, **BARE, **begun),
        tiny_arguments(corpus, branch, **BARE, **off),
    ]
    run_distributed(train_in_turn, 1, commands, time_limit=300)
    expected = essentials(whole)
    assert len({record["learning_rate"] for record in expected}) == 4  # half of the peak, it, and twice below it

    def of_run(path: Path) -> list[dict]:
        return [{key: value for key, value in record.items() if key != "steps_left"} for record in essentials(path)]

    assert of_run(stable) + of_run(branch) == of_run(whole)
    (tmp_path / "whole" / "metrics.jsonl").write_text(
        "".join((tmp_path / "whole" / "metrics.jsonl").read_text().splitlines(keepends=True)[5:]), encoding="utf-8"
    )
    assert_same_run(branch, whole)
    log = (branch / "train.log").read_text(encoding="utf-8")
    assert f"going on after step 5 of {stable / 'checkpoints' / 'step-00000005'}: " in log
    was, now = "constant at 0.01", "wsd at 0.01, 1-sqrt from step 5 to 0.001 at step 8"
    assert f"the schedule of the learning rate was {was}; from step 5 on it is {now}" in log


def test_a_folder_that_has_checkpoints_goes_on_from_them(corpus, tmp_path):
    runs = finished_runs(corpus)

    def config(run: Path):
        names = {"training__run_dir": run, "checkpoint__resume": "auto", "checkpoint__branch_from": runs.whole}
        return small_config(**names)

    with alone():
        assert find_resume(config(tmp_path)) == (runs.whole / "checkpoints" / LATEST, [])
        assert find_resume(config(runs.moved)) == (runs.moved / "checkpoints" / LATEST, [])


def changed(folder: Path, step: int, **now) -> list[str]:
    return schedule_changed(folder, step, small_config(**BARE, **now))


def test_another_schedule_is_said_and_one_that_lies_in_the_past_is_refused(tmp_path):
    decays = {"optimizer__schedule": "wsd", "optimizer__decay_steps": 10}
    (tmp_path / CONFIG).write_text(to_yaml(small_config(**BARE, training__steps=100, **decays)), encoding="utf-8")
    assert changed(tmp_path, 95, training__steps=100, **decays) == []
    (line,) = changed(tmp_path, 50, training__steps=60, **decays)
    assert "linear from step 90 to 3e-05 at step 100; from step 50 on it is" in line
    (line,) = changed(tmp_path, 50, training__steps=100)
    assert line.endswith("on it is cosine from 0.0003 after 2 steps of warm-up to 3e-05 at step 100")
    changes = changed(tmp_path, 95, training__steps=100, **decays, optimizer__router_learning_rate_factor=0.1)
    assert changes == ["the factor on the router's learning rate was 1, and is 0.1"]
    with pytest.raises(UserError, match=r"begin at step 45, but .* has done 50 steps .*at most 5, or .* at least 60"):
        changed(tmp_path, 50, training__steps=55, **decays)
