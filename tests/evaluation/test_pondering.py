"""Measurements of every token, against the sequential model run by hand."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from megatron_ponder.base.errors import UserError
from megatron_ponder.evaluation.inference_flops import inference_flops
from megatron_ponder.evaluation.perplexity import Setting, evaluate
from megatron_ponder.evaluation.pondering import contraction, measure, refined_losses, shuffled
from megatron_ponder.model.router import Rule
from tests.generation.sequential import Sequential, feed
from tests.models import random_tokens, small_model

BATCHES = [random_tokens(2, 15, seed=0), random_tokens(1, 8, seed=1)]
AT_ONCE = Rule("hard", threshold=1.0)  # every w but the first is smaller: no latent step


@pytest.fixture(scope="module")
def model():
    return small_model(router_scale=4.0).eval()


@torch.no_grad()
def by_hand(model, rule, chosen=None):
    """Token by token: K̂, the losses of the fused state and of h_{t,0}, and s; K̂ is `chosen` if that is given."""
    rows = []
    for row in (row for batch in BATCHES for row in batch):
        state = Sequential()
        for token, label in zip(row[:-1].tolist(), row[1:], strict=True):
            first = copy.deepcopy(state)
            first_logits = feed(model, AT_ONCE, first, token)
            own = rule if chosen is None else replace(rule, executed=chosen[len(rows)].view(1))
            logits = feed(model, own, state, token)
            steps = torch.arange(model.ponder_config.steps + 1)
            s = (model.router(first.outputs[-1]) + rule.bias * steps).softmax(-1)
            losses = [float(F.cross_entropy(x, label)) for x in (logits, first_logits)]
            rows.append((state.executed[-1], *losses, s.numpy()))
    return [np.array(column) for column in zip(*rows, strict=True)]


@pytest.mark.parametrize(("threshold", "bias"), [(0.3, 0.0), (0.1, -1.0)])
def test_every_token_under_the_hard_rule(model, threshold, bias):
    rule = model.rule("hard", threshold, bias)
    got = measure(model, BATCHES, Setting(rule, None))
    executed, loss, first_loss, distribution = by_hand(model, rule)
    assert len(set(executed.tolist())) == 3
    assert got.executed.tolist() == executed.tolist()
    for name, want in (("loss", loss), ("first_loss", first_loss), ("distribution", distribution)):
        assert getattr(got, name) == pytest.approx(want, abs=1e-9), name
    assert got.gain == pytest.approx(first_loss - loss, abs=1e-9)
    assert got.tokens.tolist() == torch.cat([batch[:, :-1].flatten() for batch in BATCHES]).tolist()
    assert got.labels.tolist() == torch.cat([batch[:, 1:].flatten() for batch in BATCHES]).tolist()
    of_first = torch.from_numpy(executed[:28]).view(2, 14)
    assert got.flops[:28] == pytest.approx(inference_flops(of_first, model).flatten().numpy())


def test_steps_chosen_from_outside_are_those_that_run(model):
    rule = model.rule("hard", 0.3)
    chosen = torch.randint(0, 3, (35,), generator=torch.Generator().manual_seed(0))
    got = measure(model, BATCHES, Setting(replace(rule, executed=chosen), None))
    executed, loss, first_loss, _ = by_hand(model, rule, chosen)
    assert got.executed.tolist() == executed.tolist() == chosen.tolist()
    assert got.loss == pytest.approx(loss, abs=1e-9)
    assert got.first_loss == pytest.approx(first_loss, abs=1e-9)


def test_random_steps_are_as_many_but_elsewhere(model):
    measured = measure(model, BATCHES, Setting(model.rule("hard", 0.3), 1))
    drawn = [shuffled(measured, seed).executed for seed in (0, 0, 1)]
    assert drawn[0].tolist() == drawn[1].tolist() != drawn[2].tolist()
    for chosen in drawn:
        assert sorted(chosen.tolist()) == sorted(measured.executed.tolist())
        assert chosen.tolist() != measured.executed.tolist()
    control = measure(model, BATCHES, Setting(shuffled(measured, 0), 1))
    assert control.executed.mean() == measured.executed.mean()
    assert abs(control.loss.mean() - measured.loss.mean()) > 1e-6
    assert shuffled(measured, 0).threshold == 0.3


@pytest.mark.parametrize("refinements", [0, 2, None])
@pytest.mark.parametrize("kind", ["soft", "hard"])
def test_means_are_those_of_an_evaluation(model, kind, refinements):
    setting = Setting(model.rule(kind, 0.3), refinements)
    got, want = measure(model, BATCHES, setting), evaluate(model, BATCHES, setting)
    assert got.loss.mean() == pytest.approx(want.cross_entropy, abs=1e-12)
    assert got.executed.mean() == pytest.approx(want.mean_steps)
    assert got.flops.mean() == pytest.approx(want.flops)


@pytest.mark.parametrize("mode", ["fixed", "vanilla"])
def test_models_without_a_router(mode):
    model = small_model(ponder__mode=mode).eval()
    rule = model.rule("hard")
    got = measure(model, BATCHES, Setting(rule, None))
    assert got.distribution is None
    assert set(got.executed.tolist()) == {model.ponder_config.steps}
    want = torch.cat([model.head(model.exact(batch[:, :-1], rule).output_BLH).flatten(0, 1) for batch in BATCHES])
    loss = F.cross_entropy(want, torch.from_numpy(got.labels), reduction="none")
    assert got.loss == pytest.approx(loss.detach().numpy(), abs=1e-9)
    if mode == "vanilla":
        assert got.gain == pytest.approx(0)
    else:
        assert abs(got.gain).mean() > 1e-3
        # a few parallel passes keep no hidden state from before the steps
        assert measure(model, BATCHES, Setting(rule, 1)).first_loss is None


@torch.no_grad()
@pytest.mark.parametrize("mode", ["adaptive", "fixed"])
def test_contraction_is_the_distance_to_an_iterate_far_away(mode):
    model = small_model(ponder__mode=mode).eval()
    iterates = [
        torch.cat([model.jacobi(batch[:, :-1], r, model.rule("soft")).hidden_BLSH.flatten() for batch in BATCHES])
        for r in (0, 1, 2, 3, 4, 5, 80)
    ]
    want = [float((hidden - iterates[-1]).square().mean().sqrt()) for hidden in iterates[:6]]
    got = contraction(model, BATCHES, 6)
    assert got.rmse == pytest.approx(want, rel=1e-6)
    assert got.rms == pytest.approx(float(iterates[-1].square().mean().sqrt()))
    assert got.fitted == 6
    logs, x = np.log(want), np.arange(6)
    slope = ((x - x.mean()) * (logs - logs.mean())).sum() / ((x - x.mean()) ** 2).sum()
    assert got.factor == pytest.approx(np.exp(slope), rel=1e-5)
    assert 0 < got.factor < 1


def test_contraction_stops_at_rounding_and_is_nothing_without_iterates():
    # attention that hardly matters: iterates arrive at once, and what remains is rounding
    model = small_model(router_scale=0.0).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".attention." in name and parameter.dim() == 2:
                parameter.mul_(1e-3)
    found = contraction(model, BATCHES, 12)
    assert 2 <= found.fitted < 12
    assert max(found.rmse[found.fitted :]) < 1e-12 * 256
    assert contraction(small_model(ponder__mode="vanilla").eval(), BATCHES, 3) is None


def test_nothing_to_measure(model):
    with pytest.raises(UserError, match="nothing to measure; give a longer text"):
        measure(model, [], Setting(model.rule("hard"), None))
    with pytest.raises(UserError, match="nothing to measure; give a longer text"):
        contraction(model, [], 3)


@pytest.mark.parametrize("kind", ["soft", "hard"])
@pytest.mark.parametrize("mode", ["adaptive", "fixed"])
def test_every_number_of_refinements_comes_of_one_run_of_the_passes(mode, kind):
    model = small_model(router_scale=4.0, ponder__mode=mode, inference__threshold=0.3).eval()
    rule = model.rule(kind)
    got = refined_losses(model, BATCHES, (4, 0, 1), rule)
    want = [(r, evaluate(model, BATCHES, Setting(rule, r)).cross_entropy) for r in (0, 1, 4)]
    assert [r for r, _ in got] == [0, 1, 4]
    assert [loss for _, loss in got] == pytest.approx([loss for _, loss in want], rel=1e-9)
    assert len({round(loss, 6) for _, loss in got}) == 3
