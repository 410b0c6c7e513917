"""λ follows its schedule, and with a target the number of steps that it leads to."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_ponder.checkpoint.run_state import RunState
from megatron_ponder.config import Config, PonderConfig, PonderTrainingConfig
from megatron_ponder.model.router import Rule, route
from megatron_ponder.model.tally import Tally
from megatron_ponder.training.objective import weighed
from megatron_ponder.training.penalty import LARGEST_FACTOR, Penalty, divergence

PRIOR = [0.1, 0.2, 0.3, 0.4]
ON_BATCH = {"penalty": "batch", "penalty_prior": PRIOR, "penalty_weight": 0.5}


def penalty_of(state: RunState | None = None, **training) -> Penalty:
    config = Config(ponder=PonderConfig(latent_steps=3), ponder_training=PonderTrainingConfig(**training))
    return Penalty(config, state or RunState())


def steered(state: RunState) -> tuple:
    """What is remembered of steering."""
    return state.penalty_factor, state.penalty_steps


def test_penalty_is_warmed_up_linearly():
    penalty = penalty_of(penalty_weight=0.4, penalty_start=10, penalty_end=20)
    assert [penalty.weight(step) for step in (0, 9, 10, 15, 20, 99)] == pytest.approx([0, 0, 0, 0.2, 0.4, 0.4])
    assert penalty_of(penalty_weight=0.4).weight(0) == 0.4


def test_without_a_target_nothing_is_steered():
    state = RunState()
    penalty = penalty_of(state, penalty_weight=0.4)
    penalty.observe(100, 3.0)
    assert state == RunState()


def test_it_is_steered_from_the_end_of_the_warm_up_on():
    state = RunState()
    target = {"target_latent_steps": 1.0, "target_rate": 0.1}
    penalty = penalty_of(state, penalty_weight=0.4, penalty_start=10, penalty_end=20, **target)
    penalty.observe(19, 3.0)
    assert state == RunState()
    penalty.observe(20, 1.5)
    assert steered(state) == pytest.approx((math.exp(0.05), 1.5))
    assert penalty.weight(21) == pytest.approx(0.4 * math.exp(0.05))
    assert penalty.weight(15) == pytest.approx(0.2 * math.exp(0.05))
    penalty.observe(21, 0.75)  # half the steps, a quarter of λ at once
    assert steered(state) == pytest.approx((math.exp(0.025) / 4, 0.75))
    penalty.observe(22, 0.0)  # counts as 0.03, or λ would be 0 for ever
    assert steered(state) == pytest.approx((math.exp(-0.075) / 4 * 0.04**2, 0.03))


def test_nothing_is_steered_before_there_is_a_router():
    state = RunState()
    penalty = penalty_of(state, penalty_weight=0.4, router_start=10, target_latent_steps=1.0, target_rate=0.1)
    penalty.observe(9, 3.0)
    assert state == RunState()
    penalty.observe(10, 3.0)
    assert state.penalty_factor > 1.0


@pytest.mark.parametrize("needed", [0.001, 0.02, 0.5])
def test_a_router_that_answers_slowly_is_led_to_the_target(needed):
    """Mean K̂ falls with log λ and takes about 20 steps to follow it; it is 1 at the λ that is needed."""
    penalty = penalty_of(penalty_weight=0.02, target_latent_steps=1.0)
    mean_steps, late = 3.0, []
    for step in range(4000):
        settled = 3 / (1 + 2 * penalty.weight(step) / needed)
        mean_steps += (settled - mean_steps) / 20
        penalty.observe(step, mean_steps)
        late = [*late, mean_steps][-1000:]
    assert max(abs(steps - 1.0) for steps in late) < 0.02


@pytest.mark.parametrize("target", [0.3, 1.0, 2.0])
def test_a_router_whose_weights_add_up_what_lambda_says_does_not_swing_far(target):
    """As Adam moves them: by what λ is above or below what a step brings, at most so far an optimiser step."""
    penalty = penalty_of(penalty_weight=0.02, target_latent_steps=target)
    logit, course = 5.0, []
    for step in range(3000):
        mean_steps = 3 / (1 + math.exp(-logit))
        push = math.log(0.05 / penalty.weight(step)) + 1.5 - mean_steps  # what steps bring falls with their number
        logit += 0.03 * max(-1.0, min(1.0, push))
        penalty.observe(step, mean_steps)
        course.append(mean_steps)
    assert min(course) > target / 2
    assert max(abs(steps - target) for steps in course[-500:]) < 0.05 * target


@given(st.lists(st.floats(0, 10), max_size=50), st.floats(0.001, 1))
def test_lambda_stays_within_bounds_and_resumes_from_its_state_alone(mean_steps, rate):
    config = {"penalty_weight": 0.01, "target_latent_steps": 2.0, "target_rate": rate}
    state, resumed = RunState(), RunState()
    whole = penalty_of(state, **config)
    for step, value in enumerate(mean_steps):
        whole.observe(step, value)
        resumed = replace(resumed)
        penalty_of(resumed, **config).observe(step, value)
    assert 1 / LARGEST_FACTOR <= state.penalty_factor <= LARGEST_FACTOR
    assert resumed == state


def test_a_penalty_on_the_batch_begins_when_its_mean_is_known():
    state = RunState()
    penalty = penalty_of(state, **ON_BATCH, router_start=3, penalty_end=10)
    penalty.observe(2, 3.0, [0.0, 0.0, 0.0, 1.0])  # which no router has given
    assert state == RunState()
    assert (penalty.weight(5), penalty.weights(5)) == (0.0, 0.0)
    penalty.observe(4, 1.0, [0.4, 0.3, 0.3, 0.0])
    resumed = penalty_of(replace(state), **ON_BATCH, router_start=3, penalty_end=10)
    want = [math.log(4), math.log(1.5), 0.0, math.log(1e-6 / 0.4)]
    for each in (penalty, resumed):
        assert each.weight(5) == 0.25
        assert each.weights(5) == pytest.approx([0.25 * ratio for ratio in want])


def test_a_rate_is_a_geometric_prior():
    prior = penalty_of(penalty="batch", penalty_prior=0.5, penalty_weight=1.0)._prior
    assert prior == pytest.approx([8 / 15, 4 / 15, 2 / 15, 1 / 15])


def test_the_gradient_is_that_of_the_divergence_of_the_whole_batch():
    """From its own mean; micro-batches and ranks, which add up, see parts of it."""
    logits = torch.randn(24, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    shares = logits.softmax(-1).mean(0)
    whole = (shares * (shares / torch.tensor(PRIOR, dtype=shares.dtype)).log()).sum()
    assert whole.item() == pytest.approx(divergence(shares.tolist(), PRIOR))
    (want,) = torch.autograd.grad(0.5 * whole, logits)
    state = RunState()
    penalty = penalty_of(state, **ON_BATCH)
    penalty.observe(0, 1.0, shares.tolist())
    for part in logits.split([5, 12, 7]):
        (weighed(route(part, Rule("soft", 0.1)), penalty.weights(1)).sum() / 24).backward()
    assert (logits.grad - want).abs().max() < 1e-15


def test_tokens_differ_and_their_mean_comes_to_the_prior():
    """One half of the tokens loses by steps and the other gains, alike; each step goes by the mean of the last."""
    logits, state = torch.zeros(16, 4, dtype=torch.float64, requires_grad=True), RunState()
    gains = torch.tensor([1.0, -1.0], dtype=torch.float64).repeat(8).unsqueeze(1) * torch.arange(4)
    penalty = penalty_of(state, **ON_BATCH | {"penalty_weight": 5.0})
    for step in range(300):
        routing = route(logits, Rule("soft", 0.1))
        s = routing.log_s.exp()
        weights = penalty.weights(step)
        loss = -0.05 * (s * gains).sum()
        if step:
            loss = loss + weighed(routing, weights).sum()
        (gradient,) = torch.autograd.grad(loss, logits)
        with torch.no_grad():
            logits -= 0.3 * gradient
        penalty.observe(step, 0.0, s.mean(0).tolist())
    assert state.penalty_shares == pytest.approx(PRIOR, abs=0.01)
    assert (s * torch.arange(4)).sum(1)[::2].mean() > (s * torch.arange(4)).sum(1)[1::2].mean() + 0.5


def test_what_is_recorded_is_the_divergence_where_a_router_decides():
    sums = dict.fromkeys(Tally._fields, 0.0) | {"steps": [0, 0, 0, 8], "own_losses": [0.0] * 4, "penalty": 24.0}
    tally = Tally(**sums | {"weights": [0.8, 1.6, 2.4, 3.2]})
    assert penalty_of(**ON_BATCH).of(tally) == pytest.approx(0)
    assert penalty_of(penalty_weight=0.1).of(tally) == 3.0
    assert penalty_of(**ON_BATCH).of(Tally(**sums | {"weights": [0.0] * 4})) == 3.0
