"""What steps cost before and after latent steps begin."""

import pytest

from megatron_ponder.estimates.flops import training_flops
from megatron_ponder.model.router import Rule
from megatron_ponder.training.schedules import StepPlan
from megatron_ponder.training.step_costs import StepCosts
from tests.models import small_config

WEIGHTED = {"ponder_training__jacobi_iterations": {0: 3, 2: 1}}


def test_a_step_before_latent_steps_costs_what_one_of_vanilla_costs():
    config = small_config(ponder__mode="fixed", ponder_training__latent_start=10)
    costs, plan = StepCosts(config), StepPlan(0.1, 2, Rule("none", 0.1), 0.0)
    assert costs.flops(plan) == training_flops(small_config(ponder__mode="vanilla"), 0)
    assert costs.slots(plan) == 1
    assert costs.flops(plan._replace(rule=Rule("soft", 0.1))) == training_flops(config, 2)


def test_the_rest_of_a_run_is_counted_in_steps_like_the_last():
    config = small_config(training__steps=100, ponder_training__latent_start=40, **WEIGHTED)
    costs = StepCosts(config)
    plain = training_flops(config, 0, latents=False)
    ratio = (3 * training_flops(config, 0) + training_flops(config, 2)) / 4 / plain
    assert costs.left(1) == pytest.approx(39 + 60 * ratio)
    assert costs.left(40) == pytest.approx(60 * ratio)
    assert [costs.left(step) for step in (41, 99, 100)] == [59, 1, 0]
    assert costs.change(40) == f"latent steps begin: from here a step takes {ratio:.1f} times as many operations"
    assert [costs.change(step) for step in (0, 39, 41)] == [None] * 3


def test_a_run_that_has_latent_steps_throughout_or_never_costs_the_same_all_the_time():
    for overrides in ({}, {"ponder__mode": "vanilla", "ponder_training__latent_start": 40}):
        costs = StepCosts(small_config(training__steps=100, **overrides))
        assert [costs.left(step) for step in (1, 40, 100)] == [99, 60, 0]
        assert costs.change(0) is None and costs.change(40) is None
    never = StepCosts(small_config(training__steps=100, ponder_training__latent_start=200))
    assert [never.left(step) for step in (1, 100)] == [99, 0]
