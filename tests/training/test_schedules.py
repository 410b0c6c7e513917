"""Schedules are pure functions of the step."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.optim.lr_scheduler import ConstantLR, CosineAnnealingLR, LambdaLR, LinearLR, LRScheduler, SequentialLR

from megatron_ponder.config import Config, InferenceConfig, OptimizerConfig, PonderTrainingConfig
from megatron_ponder.model.router import Rule
from megatron_ponder.training.schedules import describe_learning_rate, learning_rate, refinements, training_rule

PEAK, LOWEST, STEPS, WARMUP, DECAY = 2.0, 0.5, 50, 5, 20
WSD = {"schedule": "wsd", "decay_steps": DECAY}
SCHEDULES = {
    "cosine": {"schedule": "cosine"},
    "linear": {"schedule": "linear"},
    "constant": {"schedule": "constant"},
    "inverse_sqrt": {"schedule": "inverse_sqrt"},
    "wsd": WSD,
    "wsd 1-sqrt": WSD | {"decay_shape": "1-sqrt"},
    "wsd cosine": WSD | {"decay_shape": "cosine"},
}


def test_learning_rate_warms_up_and_falls_to_its_floor():
    config = OptimizerConfig(learning_rate=1.0, warmup_fraction=0.1, min_learning_rate_fraction=0.1)
    rates = [learning_rate(step, 100, config) for step in range(100)]
    assert rates[:10] == pytest.approx([0.1 * (step + 1) for step in range(10)])
    assert rates[10] == 1.0
    assert rates[55] == pytest.approx(0.55)  # half-way down the cosine
    assert all(a > b for a, b in pairwise(rates[10:]))
    assert learning_rate(100, 100, config) == pytest.approx(0.1)


@given(steps=st.integers(1, 10_000), share=st.floats(0, 0.99))
def test_learning_rate_is_never_above_its_peak_or_zero(steps, share):
    config = OptimizerConfig(learning_rate=3e-4, warmup_fraction=share)
    for step in {0, steps // 3, steps // 2, steps - 1}:
        assert 0 < learning_rate(step, steps, config) <= 3e-4


def torchs(name: str, optimizer: torch.optim.Optimizer) -> LRScheduler:
    """The same of PyTorch's schedulers."""
    stays = ConstantLR(optimizer, factor=1, total_iters=1)
    share, length = LOWEST / PEAK, DECAY if "wsd" in name else STEPS - WARMUP
    falls = {
        "linear": lambda: LinearLR(optimizer, 1, share, length),
        "cosine": lambda: CosineAnnealingLR(optimizer, length, LOWEST),
        "1-sqrt": lambda: LambdaLR(optimizer, lambda step: share + (1 - share) * (1 - (step / length) ** 0.5)),
        "inverse_sqrt": lambda: LambdaLR(optimizer, lambda step: max(share, (WARMUP / (WARMUP + step)) ** 0.5)),
        "constant": lambda: ConstantLR(optimizer, factor=1, total_iters=1),
        "wsd": lambda: LinearLR(optimizer, 1, share, length),
    }[name.split()[-1]]()
    rises = LinearLR(optimizer, 1 / WARMUP, 1, WARMUP - 1)
    if "wsd" in name:
        return SequentialLR(optimizer, [rises, stays, falls], [WARMUP, STEPS - DECAY])
    return SequentialLR(optimizer, [rises, falls], [WARMUP])


@pytest.mark.filterwarnings("ignore")  # of steps of a scheduler before those of its optimiser
@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_are_pytorchs(name):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=PEAK)
    scheduler, expected = torchs(name, optimizer), []
    for _ in range(STEPS):
        expected.append(optimizer.param_groups[0]["lr"])
        scheduler.step()
    given = {"warmup_steps": WARMUP, "min_learning_rate": LOWEST} | SCHEDULES[name]
    config = OptimizerConfig(learning_rate=PEAK, **given)
    assert [learning_rate(step, STEPS, config) for step in range(STEPS)] == pytest.approx(expected, rel=1e-12)
    last = PEAK * max((WARMUP / STEPS) ** 0.5, LOWEST / PEAK) if name == "inverse_sqrt" else LOWEST
    assert learning_rate(STEPS, STEPS, config) == pytest.approx(PEAK if name == "constant" else last)


@st.composite
def schedules(draw) -> tuple[int, OptimizerConfig]:
    """A length of a run, and a schedule that fits it; few different ones, so that some are drawn twice."""
    steps = draw(st.integers(1, 12)) * draw(st.sampled_from([1, 100]))
    given = dict(SCHEDULES[draw(st.sampled_from(list(SCHEDULES)))])
    warmup = draw(st.integers(int(given["schedule"] == "inverse_sqrt"), steps))
    if given["schedule"] == "wsd":
        given["decay_steps"] = draw(st.integers(0, steps - warmup))
    lowest = draw(st.sampled_from([0.0, 0.1, 1.0]))
    return steps, OptimizerConfig(warmup_steps=warmup, min_learning_rate_fraction=lowest, **given)


@given(schedules())
def test_schedules_rise_to_their_peak_and_fall_to_their_lowest_without_a_leap(drawn):
    steps, config = drawn
    rates, warmup = [learning_rate(step, steps, config) for step in range(steps + 1)], config.warmup(steps)
    peak, lowest = config.learning_rate, config.learning_rate * config.lowest_share
    assert all(0 < a < b for a, b in pairwise(rates[:warmup]))
    assert all(lowest * (1 - 1e-12) <= rate <= peak for rate in rates[warmup:])
    assert all(a >= b for a, b in pairwise(rates[warmup:]))
    lengths = [warmup, config.decay_steps or steps - warmup]
    leap = max(length**-0.5 for length in lengths if length) if any(lengths) else 0
    assert all(abs(a - b) <= peak * leap * (1 + 1e-12) for a, b in pairwise(rates))


@given(schedules(), schedules(), st.integers(0, 12))
def test_schedules_that_are_told_alike_are_alike(one, other, step):
    same = describe_learning_rate(step, *one) == describe_learning_rate(step, *other)
    steps = range(step, max(one[0], other[0]) + 2)
    assert not same or [learning_rate(n, *one) for n in steps] == [learning_rate(n, *other) for n in steps]


def test_schedules_in_words():
    config = OptimizerConfig(learning_rate=0.01, warmup_steps=5, schedule="wsd", decay_steps=10)
    rising = "wsd at 0.01 after 5 steps of warm-up, linear from step 40 to 0.001 at step 50"
    assert describe_learning_rate(4, 50, config) == rising
    assert describe_learning_rate(5, 50, config) == "wsd at 0.01, linear from step 40 to 0.001 at step 50"
    config = OptimizerConfig(learning_rate=0.01, warmup_fraction=0.1)
    assert describe_learning_rate(9, 50, config) == "cosine from 0.01 after 5 steps of warm-up to 0.001 at step 50"


def test_refinements_are_drawn_uniformly_and_depend_on_seed_and_step_only():
    config = PonderTrainingConfig(jacobi_iterations=[2, 3])
    drawn = [refinements(step, 1, config) for step in range(4000)]
    assert drawn == [refinements(step, 1, config) for step in range(4000)]
    assert drawn != [refinements(step, 2, config) for step in range(4000)]
    assert abs(drawn.count(2) / 4000 - 0.5) < 0.03
    assert {refinements(step, 1, PonderTrainingConfig(jacobi_iterations=5)) for step in range(10)} == {5}


def test_refinements_are_drawn_by_their_weights():
    config = PonderTrainingConfig(jacobi_iterations={0: 3, 2: 5, 6: 1})
    drawn = [refinements(step, 1, config) for step in range(9000)]
    assert [drawn.count(r) / 1000 for r in (0, 2, 6)] == pytest.approx([3, 5, 1], abs=0.2)
    assert (config.refinement_choices, config.evaluation_refinements) == ((0, 2, 6), 6)
    even = PonderTrainingConfig(jacobi_iterations={2: 1, 3: 1})
    listed = PonderTrainingConfig(jacobi_iterations=[2, 3])
    assert all(refinements(step, 7, even) == refinements(step, 7, listed) for step in range(99))


def test_latent_steps_begin_before_the_router():
    training = PonderTrainingConfig(latent_start=5, router_start=10, prune_start=20)
    kinds = [training_rule(step, Config(ponder_training=training)).kind for step in (0, 4, 5, 9, 10, 20)]
    assert kinds == ["none", "none", "all", "all", "soft", "hard"]
    assert {training_rule(step, Config(ponder_training=training)).share for step in range(30)} == {1.0}
    training = PonderTrainingConfig(latent_start=5, prune_start=0)
    assert [training_rule(step, Config(ponder_training=training)).kind for step in (4, 5)] == ["none", "hard"]


def test_latent_steps_gain_their_weight_little_by_little():
    config = Config(ponder_training=PonderTrainingConfig(latent_start=5, latent_warmup=3, router_start=10))
    assert [training_rule(step, config).share for step in range(5, 10)] == [0.25, 0.5, 0.75, 1.0, 1.0]
    early = Config(ponder_training=PonderTrainingConfig(latent_start=5, latent_warmup=3, router_start=8))
    assert [training_rule(step, early).kind for step in (7, 8)] == ["all", "soft"]


def test_pruning_and_the_router_begin_at_their_steps():
    training = PonderTrainingConfig(prune_start=20, router_start=10)
    config = Config(ponder_training=training, inference=InferenceConfig(threshold=0.25))
    rules = [training_rule(step, config) for step in (0, 9, 10, 19, 20, 99)]
    assert [rule.kind for rule in rules] == ["all", "all", "soft", "soft", "hard", "hard"]
    assert {rule.threshold for rule in rules} == {0.25}
    always = Config(inference=InferenceConfig(threshold=1e-4))
    assert training_rule(10**9, always) == Rule("soft", 1e-4) == training_rule(0, always)
