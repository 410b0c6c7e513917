"""What steps cost: before and after latent steps begin, and where slots are not run."""

import pytest

from megatron_ponder.estimates.flops import training_flops
from megatron_ponder.model.router import Rule
from megatron_ponder.model.tally import Tally
from megatron_ponder.training.objective import Objective
from megatron_ponder.training.schedules import StepPlan
from megatron_ponder.training.step_costs import StepCosts
from tests.models import random_tokens, small_config, small_model

WEIGHTED = {"ponder_training__jacobi_iterations": {0: 3, 2: 1}}
RUN = {"training__steps": 100, "training__global_batch_size": 8}
SIZES = {"training__global_batch_size": 3, "data__sequence_length": 17}


def measured(rule: Rule, packed: bool, gradient_passes: int | None = None, **overrides) -> Tally:
    objective = Objective(small_model(**overrides), gradient_passes, packed)
    return Tally.of(objective(random_tokens(3, 18), 2, rule)[1].sum(0))


@pytest.mark.parametrize("gradient_passes", [None, 2])
@pytest.mark.parametrize("mode", ["adaptive", "fixed", "pause", "loop", "own"])
def test_steps_that_run_their_whole_plan_cost_what_estimates_say(mode, gradient_passes):
    model = {"ponder__latent_visibility": "own"} if mode == "own" else {"ponder__mode": mode}
    overrides = SIZES | model
    if gradient_passes is not None:
        overrides["ponder_training__gradient_passes"] = gradient_passes
    config, rule = small_config(**overrides), Rule("soft", 0.1)
    tally = measured(rule, False, gradient_passes, **model)
    assert StepCosts(config).flops(StepPlan(0.1, 2, rule, 0.0), tally) == training_flops(config, 2)


def test_a_step_before_latent_steps_costs_what_one_of_vanilla_costs():
    config, rule = small_config(ponder__mode="fixed", ponder_training__latent_start=10, **SIZES), Rule("none", 0.1)
    tally = measured(rule, False, ponder__mode="fixed")
    assert tally.slots == 3 * 17
    plan = StepPlan(0.1, 2, rule, 0.0)
    assert StepCosts(config).flops(plan, tally) == training_flops(small_config(ponder__mode="vanilla", **SIZES), 0)


def test_slots_that_are_not_run_cost_nothing():
    config, rule = small_config(**SIZES), Rule("hard", 0.4)
    plan, costs = StepPlan(0.1, 2, rule, 0.0), StepCosts(config)
    masked, packed = (measured(rule, packs) for packs in (False, True))
    assert masked.steps == packed.steps and min(packed.steps) > 0
    assert masked.slots == 3 * 17 * (1 + 2 + 3 * 3)
    assert 5 * 3 * 17 < packed.slots < masked.slots
    shares = [packed.slot_work / masked.slot_work, packed.pair_work / masked.pair_work]
    assert shares[1] < shares[0] == packed.slots / masked.slots
    assert shares[1] < costs.flops(plan, packed) / costs.flops(plan, masked) < 1


def test_slots_that_are_run_once_cost_no_more():
    own = {"ponder__latent_visibility": "own"}
    config, rule = small_config(**SIZES, **own), Rule("hard", 0.4)
    plan, costs = StepPlan(0.1, 2, rule, 0.0), StepCosts(config)
    masked, packed = (measured(rule, packs, **own) for packs in (False, True))
    assert masked.slots == 3 * 17 * 3 and masked.slot_work == 3 * masked.slots
    assert masked.pair_work == 3 * 3 * sum(token + 1 + step for token in range(17) for step in range(3))
    executed = [sum(masked.steps[step:]) for step in range(3)]
    assert packed.slots == sum(executed) < masked.slots
    # a token sees 9 first slots in the mean, and its own
    assert packed.pair_work == 3 * sum(count * (9 + step) for step, count in enumerate(executed))
    assert costs.flops(plan, packed) < costs.flops(plan, masked) == training_flops(config, 2)


def test_the_rest_of_a_run_is_counted_in_steps_like_the_last():
    config = small_config(**RUN, ponder_training__latent_start=40, **WEIGHTED)
    costs = StepCosts(config)
    plain = training_flops(config, 0, latents=False)
    ratio = (3 * training_flops(config, 0) + training_flops(config, 2)) / 4 / plain
    assert costs.left(1, 8, 8) == pytest.approx(39 + 60 * ratio)
    assert costs.left(40, 320, 8) == pytest.approx(60 * ratio)
    assert [costs.left(step, 8 * step, 8) for step in (41, 99, 100)] == [59, 1, 0]
    assert costs.change(40) == f"latent steps begin: from here a step takes {ratio:.1f} times as many operations"
    assert [costs.change(step) for step in (0, 39, 41)] == [None] * 3


def test_a_run_that_has_latent_steps_throughout_or_never_costs_the_same_all_the_time():
    for overrides in ({}, {"ponder__mode": "vanilla", "ponder_training__latent_start": 40}):
        costs = StepCosts(small_config(**RUN, **overrides))
        assert [costs.left(step, 8 * step, 8) for step in (1, 40, 100)] == [99, 60, 0]
        assert costs.change(0) is None and costs.change(40) is None
    never = StepCosts(small_config(**RUN, ponder_training__latent_start=200))
    assert [never.left(step, 8 * step, 8) for step in (1, 100)] == [99, 0]


def test_the_rest_of_a_run_whose_batch_grows_is_counted_in_its_last_step():
    """Steps of 2 up to sample 20, of 5 up to 40, and of 8."""
    costs = StepCosts(small_config(**RUN, training__batch_size_ramp="2 3 40", training__micro_batch_size=1))
    assert costs.left(9, 18, 2) == (2 + 4 * 5 + 86 * 8) / 2
    assert costs.left(10, 20, 2) == (4 * 5 + 86 * 8) / 2
    assert costs.left(11, 25, 5) == (3 * 5 + 86 * 8) / 5
    assert costs.left(20, 88, 8) == 80
