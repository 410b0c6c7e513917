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
