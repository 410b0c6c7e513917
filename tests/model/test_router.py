"""The router's numbers: distributions, tails, the hard rule and the fusion."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from megatron_ponder.config import ModelConfig, PonderConfig
from megatron_ponder.kernels.attention import DEAD
from megatron_ponder.model.router import Router, Rule, fusion_weights, key_log_weights, route
from megatron_ponder.parallel.mesh import Axis
from megatron_ponder.parallel.sharding import initialize

thresholds = st.sampled_from([0.0, 1e-30, 1e-4, 0.3, 0.999, 1.0]) | st.floats(0, 1)


@st.composite
def logit_tensors(draw) -> Tensor:
    """(tokens, K + 1), with gaps from none to far beyond what exp can hold."""
    options, scale = draw(st.integers(2, 6)), draw(st.sampled_from([1.0, 10.0, 200.0, 2000.0]))
    row = st.lists(st.floats(-1, 1), min_size=options, max_size=options)
    return scale * torch.tensor(draw(st.lists(row, min_size=1, max_size=4)), dtype=torch.float64)


def soft(threshold: float = 1e-4, bias: float = 0.0) -> Rule:
    return Rule("soft", threshold=threshold, bias=bias)


@given(logits=logit_tensors())
def test_s_is_a_distribution_and_w_its_tails(logits):
    routing = route(logits, soft())
    s, w = routing.log_s.exp(), routing.log_w.exp()
    torch.testing.assert_close(s, logits.softmax(-1), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(s.sum(-1), torch.ones(len(logits), dtype=s.dtype), rtol=1e-9, atol=1e-9)
    tails = torch.stack([logits.softmax(-1)[:, k:].sum(-1) for k in range(logits.shape[1])], -1)
    torch.testing.assert_close(w, tails, rtol=1e-9, atol=1e-12)
    assert (routing.log_w[:, 0] == 0).all()
    assert (routing.log_w.diff(dim=-1) <= 0).all()
    assert routing.log_w.isfinite().all()


@given(logits=logit_tensors(), threshold=thresholds)
def test_executed_steps_by_their_definition(logits, threshold):
    routing = route(logits, soft(threshold))
    for log_w, executed in zip(routing.log_w, routing.executed, strict=True):
        assert int(executed) == max(k for k, weight in enumerate(log_w.exp().tolist()) if weight >= threshold)


@pytest.mark.parametrize("threshold", [0.0, 1e-4, 1.0])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_logits_that_are_not_finite_execute_no_step_that_there_is_not(bad, threshold):
    logits = torch.zeros(3, 4)
    logits[0, 2] = bad
    logits[1] = bad
    for rule in (Rule("soft", threshold), Rule("hard", threshold), Rule("all", threshold)):
        executed = route(logits, rule).executed
        assert set(executed.tolist()) <= {0, 1, 2, 3}
        assert F.one_hot(executed, 4).sum() == 3


@given(logits=logit_tensors(), threshold=thresholds, data=st.data())
def test_executed_steps_that_are_given(logits, threshold, data):
    last = logits.shape[1] - 1
    chosen = torch.tensor(data.draw(st.lists(st.integers(0, last), min_size=len(logits), max_size=len(logits))))
    rule = Rule("hard", threshold, executed=chosen)
    routing, own = route(logits, rule), route(logits, Rule("hard", threshold))
    assert torch.equal(routing.executed, chosen)
    assert torch.equal(routing.log_w, own.log_w) and torch.equal(routing.log_s, own.log_s)
    weights, keys = fusion_weights(routing, rule), key_log_weights(routing, rule)
    torch.testing.assert_close(weights.sum(-1), torch.ones(len(logits), dtype=weights.dtype), rtol=1e-9, atol=1e-9)
    for token, steps in enumerate(chosen.tolist()):
        assert not weights[token, steps + 1 :].any()
        assert (keys[token, steps + 1 :] == DEAD).all()


@given(logits=logit_tensors(), threshold=thresholds, kind=st.sampled_from(["soft", "hard"]))
def test_fusion_weights_sum_to_one_for_every_threshold(logits, threshold, kind):
    rule = Rule(kind, threshold)
    routing = route(logits, rule)
    weights = fusion_weights(routing, rule)
    assert (weights >= 0).all()
    torch.testing.assert_close(weights.sum(-1), torch.ones(len(logits), dtype=weights.dtype), rtol=1e-9, atol=1e-9)
    s, w = routing.log_s.exp(), routing.log_w.exp()
    for token, last in enumerate(routing.executed.tolist()):
        if kind == "soft":
            assert torch.equal(weights[token], s[token])
            continue
        assert torch.equal(weights[token, :last], s[token, :last])
        assert weights[token, last] == w[token, last]  # takes the remaining mass
        assert not weights[token, last + 1 :].any()


@given(logits=logit_tensors(), threshold=thresholds)
def test_steps_that_do_not_run_are_dead_as_keys(logits, threshold):
    routing = route(logits, soft(threshold))
    assert torch.equal(key_log_weights(routing, soft(threshold)), routing.log_w)
    hard = key_log_weights(routing, Rule("hard", threshold))
    for token, last in enumerate(routing.executed.tolist()):
        assert torch.equal(hard[token, : last + 1], routing.log_w[token, : last + 1])
        assert (hard[token, last + 1 :] == DEAD).all()


@given(logits=logit_tensors(), bias=st.floats(-5, 5))
def test_bias_is_added_once_for_each_step(logits, bias):
    shifted = logits + bias * torch.arange(logits.shape[1])
    torch.testing.assert_close(route(logits, soft(bias=bias)).log_w, route(shifted, soft()).log_w)
    more = route(logits, soft(0.3, bias + 1)).executed
    assert (more >= route(logits, soft(0.3, bias)).executed).all()


def test_bias_does_not_touch_the_given_logits():
    logits = torch.zeros(2, 3)
    route(logits, soft(bias=1.0))
    assert not logits.any()


@pytest.mark.parametrize("gap", [10.0, 80.0, 200.0, 5000.0])
def test_log_w_keeps_value_and_gradient_where_w_underflows(gap):
    logits = torch.tensor([0.0, -gap, -2 * gap], requires_grad=True)
    log_w = route(logits, soft()).log_w
    torch.testing.assert_close(log_w, torch.tensor([0.0, -gap, -2 * gap]), rtol=1e-6, atol=1e-4)
    for step in (1, 2):
        gradient = torch.autograd.grad(log_w[step], logits, retain_graph=True)[0]
        expected = torch.zeros(3)
        expected[step], expected[0] = 1, -1  # d log w_k = d g_k - d g_0 where step 0 has all the mass
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-4)


def test_gradients_by_finite_differences():
    logits = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: route(x, soft(bias=0.3))[:2], logits)


@pytest.mark.parametrize("hidden", [0, 12])
def test_router_computes_in_fp32_and_begins_near_fixed(hidden):
    ponder = PonderConfig(latent_steps=3, router_hidden_size=hidden, router_initial_bias=2.0)
    router = Router(ModelConfig(hidden_size=16), ponder, Axis())
    initialize(router, seed=0)
    h = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0))
    assert torch.equal(router(h), torch.tensor([0.0, 0.0, 0.0, 2.0]).expand(2, 5, 4))
    assert router.to(torch.bfloat16)(h.bfloat16()).dtype == torch.float32
    assert router.double()(h.double()).dtype == torch.float64
    router.output.weight.data.normal_(generator=torch.Generator().manual_seed(1))
    inner = (
        h.double() if not hidden else torch.nn.functional.gelu(h.double() @ router.hidden.weight.T + router.hidden.bias)
    )
    torch.testing.assert_close(router(h.double()), inner @ router.output.weight.T + router.output.bias)


def test_steps_that_all_take_have_a_share_of_the_output_and_the_same_weight_as_keys():
    logits = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    rule = Rule("all", 0.1, share=0.25)
    routing = route(logits, rule)
    expected = torch.tensor([0.75, 0, 0, 0.25], dtype=torch.float64).expand(5, 4)
    torch.testing.assert_close(fusion_weights(routing, rule), expected, rtol=1e-12, atol=1e-30)
    torch.testing.assert_close(routing.log_w.exp()[:, 1:], torch.full_like(logits[:, 1:], 0.25), rtol=1e-12, atol=0)
    assert (routing.executed == 3).all()
    routing.log_w.sum().backward()
    assert not logits.grad.any()
