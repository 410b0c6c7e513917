"""λ follows its schedule, and with a target the number of steps that it leads to."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_ponder.config import PonderConfig
from megatron_ponder.training.penalty import LARGEST_FACTOR, Penalty


def test_penalty_is_warmed_up_linearly():
    penalty = Penalty(PonderConfig(penalty_weight=0.4, penalty_start=10, penalty_end=20))
    assert [penalty.weight(step) for step in (0, 9, 10, 15, 20, 99)] == pytest.approx([0, 0, 0, 0.2, 0.4, 0.4])
    assert Penalty(PonderConfig(penalty_weight=0.4)).weight(0) == 0.4


def test_without_a_target_nothing_is_steered():
    penalty = Penalty(PonderConfig(penalty_weight=0.4))
    penalty.observe(100, 3.0)
    assert penalty.factor == 1.0


def test_it_is_steered_from_the_end_of_the_warm_up_on():
    config = PonderConfig(penalty_weight=0.4, penalty_start=10, penalty_end=20, target_steps=1.0, target_rate=0.1)
    penalty = Penalty(config)
    penalty.observe(19, 3.0)
    assert penalty.factor == 1.0
    penalty.observe(20, 1.5)
    assert penalty.factor == pytest.approx(math.exp(0.05))
    assert penalty.weight(21) == pytest.approx(0.4 * math.exp(0.05))
    assert penalty.weight(15) == pytest.approx(0.2 * math.exp(0.05))


def test_nothing_is_steered_before_there_is_a_router():
    penalty = Penalty(PonderConfig(penalty_weight=0.4, router_start=10, target_steps=1.0, target_rate=0.1))
    penalty.observe(9, 3.0)
    assert penalty.factor == 1.0
    penalty.observe(10, 3.0)
    assert penalty.factor > 1.0


@pytest.mark.parametrize("needed", [0.001, 0.02, 0.5])
def test_a_router_that_answers_slowly_is_led_to_the_target(needed):
    """Mean K̂ falls with log λ and takes about 20 steps to follow it; it is 1 at the λ that is needed."""
    penalty = Penalty(PonderConfig(penalty_weight=0.02, target_steps=1.0))
    mean_steps, late = 3.0, []
    for step in range(4000):
        settled = 3 / (1 + 2 * penalty.weight(step) / needed)
        mean_steps += (settled - mean_steps) / 20
        penalty.observe(step, mean_steps)
        late = [*late, mean_steps][-1000:]
    assert max(abs(steps - 1.0) for steps in late) < 0.02


@given(st.lists(st.floats(0, 10), max_size=50), st.floats(0.001, 1))
def test_lambda_stays_within_bounds_and_resumes_from_its_factor_alone(mean_steps, rate):
    config = PonderConfig(penalty_weight=0.01, target_steps=2.0, target_rate=rate)
    whole, half = Penalty(config), Penalty(config)
    for step, value in enumerate(mean_steps):
        whole.observe(step, value)
        half = Penalty(config, half.factor)
        half.observe(step, value)
    assert 1 / LARGEST_FACTOR <= whole.factor <= LARGEST_FACTOR
    assert half.factor == whole.factor
