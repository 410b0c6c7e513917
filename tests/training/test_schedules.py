"""Schedules are pure functions of the step."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_ponder.config import Config, InferenceConfig, OptimizerConfig, PonderTrainingConfig
from megatron_ponder.model.router import Rule
from megatron_ponder.training.schedules import learning_rate, refinements, training_rule


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


def test_refinements_are_drawn_uniformly_and_depend_on_seed_and_step_only():
    config = PonderTrainingConfig(jacobi_iterations=[2, 3])
    drawn = [refinements(step, 1, config) for step in range(4000)]
    assert drawn == [refinements(step, 1, config) for step in range(4000)]
    assert drawn != [refinements(step, 2, config) for step in range(4000)]
    assert abs(drawn.count(2) / 4000 - 0.5) < 0.03
    assert {refinements(step, 1, PonderTrainingConfig(jacobi_iterations=5)) for step in range(10)} == {5}


def test_pruning_and_the_router_begin_at_their_steps():
    training = PonderTrainingConfig(prune_start=20, router_start=10)
    config = Config(ponder_training=training, inference=InferenceConfig(threshold=0.25))
    rules = [training_rule(step, config) for step in (0, 9, 10, 19, 20, 99)]
    assert [rule.kind for rule in rules] == ["all", "all", "soft", "soft", "hard", "hard"]
    assert {rule.threshold for rule in rules} == {0.25}
    always = Config(inference=InferenceConfig(threshold=1e-4))
    assert training_rule(10**9, always) == Rule("soft", 1e-4) == training_rule(0, always)
