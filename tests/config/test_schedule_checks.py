"""Schedules that contradict themselves or their run are refused in one line."""

import pytest

from megatron_ponder.base.errors import UserError
from megatron_ponder.config import read_config, to_yaml


def refusal(**overrides) -> str:
    with pytest.raises(UserError) as caught:
        read_config([f"--{key.replace('__', '.')}={value}" for key, value in overrides.items()])
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"schedule": "wsd"}, "optimizer.schedule wsd needs optimizer.decay_steps"),
        ({"schedule": "wsd", "decay_steps": 101}, "optimizer.decay_steps 101 is more than training.steps 100"),
        (
            {"schedule": "wsd", "decay_steps": 90, "warmup_steps": 11},
            "decay_steps 90 and 11 steps of warm-up are more than training.steps 100",
        ),
        ({"decay_steps": 10}, "optimizer.decay_steps 10 has no meaning with optimizer.schedule cosine"),
        (
            {"schedule": "linear", "decay_shape": "1-sqrt"},
            "decay_shape 1-sqrt has no meaning with optimizer.sched",
        ),
        ({"warmup_steps": 101}, "optimizer.warmup_steps 101 is more than training.steps 100"),
        ({"min_learning_rate": 4e-4}, "optimizer.min_learning_rate 0.0004 lies above the peak"),
        ({"schedule": "inverse_sqrt", "warmup_fraction": 0}, "this one has none; set optimizer.warmup_steps"),
        ({"warmup_fraction": "null"}, "optimizer.warmup_fraction and optimizer.warmup_steps are both null"),
        ({"schedule": "WSD"}, "optimizer.schedule is WSD: write wsd"),
    ],
)
def test_schedules_that_cannot_be(given, said):
    assert said in refusal(training__steps=100, **{f"optimizer__{key}": value for key, value in given.items()})


def test_a_checkpoint_to_branch_off_from_is_the_only_one():
    assert "leave one of them out" in refusal(checkpoint__branch_from="a", checkpoint__initialize_from="b")
    assert "two checkpoints to go on from" in refusal(checkpoint__branch_from="a", checkpoint__resume="b")
    read_config(["--checkpoint.branch_from=a", "--checkpoint.resume=auto"])


def test_a_number_takes_the_place_of_a_share(tmp_path):
    config = read_config(["--optimizer.warmup_steps=7", "--optimizer.min_learning_rate=3e-5"])
    assert (config.optimizer.warmup_fraction, config.optimizer.min_learning_rate_fraction) == (None, None)
    assert config.optimizer.warmup(1000) == 7
    assert config.optimizer.lowest_share == pytest.approx(0.1)
    (tmp_path / "run.yaml").write_text(to_yaml(config), encoding="utf-8")
    assert read_config(["--config", str(tmp_path / "run.yaml")]) == config
