"""Every way of evaluating a model, against definitions written out by hand."""

import math
import re

import pytest
import torch
import torch.nn.functional as F

from megatron_ponder.base.errors import UserError
from megatron_ponder.evaluation.inference_flops import inference_flops
from megatron_ponder.evaluation.perplexity import Setting, evaluate, settings, windows
from megatron_ponder.evaluation.pondering import contraction, measure
from tests.generation.sequential import decode
from tests.models import random_tokens, small_model

BATCHES = [random_tokens(3, 21, seed=0), random_tokens(1, 9, seed=1)]


@pytest.fixture(scope="module")
def model():
    return small_model(router_scale=4.0).eval()


@torch.no_grad()
def sequential(model, rule, batch):
    """Loss summed over tokens and K̂ of every token, slot by slot."""
    total, executed = 0.0, []
    for row in batch:
        outputs, steps = decode(model, rule, row[:-1])
        total += float(F.cross_entropy(model.head(outputs), row[1:], reduction="sum"))
        executed += steps.tolist()
    return total, executed


@pytest.mark.parametrize("refinements", [0, 2])
@pytest.mark.parametrize("kind", ["soft", "hard"])
def test_cross_entropy_is_that_of_the_logits(model, kind, refinements):
    rule = model.rule(kind, threshold=0.3)
    got = evaluate(model, BATCHES, Setting(rule, refinements))
    losses = []
    with torch.no_grad():
        for batch in BATCHES:
            logits = model.head(model.jacobi(batch[:, :-1], refinements, rule).output_BLH)
            losses.append(F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="none"))
    want = torch.cat(losses)
    assert got.tokens == len(want) == 68
    assert got.cross_entropy == pytest.approx(float(want.mean()), rel=1e-12)
    assert got.perplexity == pytest.approx(math.exp(want.mean()), rel=1e-12)
    assert got.passes == model.ponder_config.latent_steps + refinements + 1
    assert got.bits_per_byte is None
    assert got.setting == f"{kind}, jacobi({refinements})"


@pytest.mark.parametrize("overrides", [{}, {"model__family": "gpt_neox"}, {"ponder__mode": "fixed"}])
def test_hard_exact_is_sequential_decoding(overrides):
    model = small_model(router_scale=4.0, **overrides).eval()
    rule = model.rule("hard", threshold=0.3)
    got = evaluate(model, BATCHES, Setting(rule, None))
    results = [sequential(model, rule, batch) for batch in BATCHES]
    executed = [steps for _, row in results for steps in row]
    assert got.setting == "hard, exact"
    assert got.cross_entropy == pytest.approx(sum(total for total, _ in results) / 68, rel=1e-9)
    assert got.mean_steps == pytest.approx(sum(executed) / 68)
    assert got.step_shares == pytest.approx([executed.count(k) / 68 for k in range(3)])
    assert got.kv_entries == pytest.approx(1 + got.mean_steps)
    if not overrides:
        assert min(got.step_shares) > 0  # otherwise this would say nothing
    flops = [
        inference_flops(torch.tensor(row).view(batch.shape[0], -1), model).sum()
        for batch, (_, row) in zip(BATCHES, results, strict=True)
    ]
    assert got.flops == pytest.approx(float(sum(flops)) / 68)


def test_the_soft_mask_runs_every_step_and_the_hard_rule_fewer(model):
    soft = evaluate(model, BATCHES, Setting(model.rule("soft", 0.3), 2))
    hard = evaluate(model, BATCHES, Setting(model.rule("hard", 0.3), 2))
    assert (soft.mean_steps, soft.step_shares) == (2.0, [0.0, 0.0, 1.0])
    assert 0 < hard.mean_steps < 2
    assert hard.flops < soft.flops
    assert hard.cross_entropy != soft.cross_entropy


def test_threshold_and_bias_move_the_steps(model):
    def steps(threshold, bias=0.0):
        return evaluate(model, BATCHES, Setting(model.rule("hard", threshold, bias), None)).mean_steps

    assert (steps(0.0), steps(1.0)) == (2.0, 0.0)
    assert steps(0.1) > steps(0.3) > steps(0.6)
    assert steps(0.3, bias=-2.0) < steps(0.3) < steps(0.3, bias=2.0)
    with pytest.raises(UserError, match=r"threshold 1\.5 is not a weight"):
        model.rule("hard", 1.5)


def test_bits_per_byte_by_hand(model):
    got = evaluate(model, BATCHES, Setting(model.rule("hard"), 1), count_bytes=lambda ids: sum(i % 3 for i in ids))
    size = sum(int(token) % 3 for batch in BATCHES for token in batch[:, 1:].flatten())
    assert got.bits_per_byte == pytest.approx(got.cross_entropy * 68 / math.log(2) / size)


def test_rows_of_each_mode(model):
    def names(model):
        return [setting.name for setting in settings(model, None, None, [0, 3])]

    assert names(model) == [
        "soft, jacobi(0)", "soft, jacobi(3)", "soft, exact", "hard, jacobi(0)", "hard, jacobi(3)", "hard, exact",
    ]  # fmt: skip
    assert names(small_model(ponder__mode="fixed")) == ["hard, jacobi(0)", "hard, jacobi(3)", "hard, exact"]
    vanilla = small_model(ponder__mode="vanilla")
    assert names(vanilla) == ["hard, exact"]
    result = evaluate(vanilla, BATCHES, settings(vanilla, None, None, [])[0])
    assert (result.mean_steps, result.step_shares, result.passes) == (0.0, [1.0], 1)


def test_windows_predict_every_token_but_the_first_once():
    tokens = list(range(23))
    parts = list(windows(tokens, 5))
    assert [len(part[0]) for part in parts] == [6, 6, 6, 6, 3]
    assert [int(token) for part in parts for token in part[0, 1:]] == tokens[1:]
    assert list(windows([7], 5)) == []
    assert [part.tolist() for part in windows([7, 8], 5)] == [[[7, 8]]]


def test_nothing_to_evaluate(model):
    with pytest.raises(UserError, match="nothing to evaluate; give a longer text"):
        evaluate(model, [], Setting(model.rule("hard"), None))


@pytest.mark.parametrize("way", [0, None], ids=["jacobi", "exact"])
@pytest.mark.parametrize("kind", ["soft", "hard"])
def test_a_model_with_a_weight_that_is_no_number_is_refused_in_words(way, kind):
    model = small_model().eval()
    with torch.no_grad():
        next(model.transformer.parameters()).flatten()[5] = math.nan
    setting = Setting(model.rule(kind), way)
    with pytest.raises(UserError, match=rf"{re.escape(setting.name)}\) is not finite: .*earlier checkpoint"):
        evaluate(model, BATCHES, setting)
    with pytest.raises(UserError, match="not finite"):
        measure(model, BATCHES, setting)
    with pytest.raises(UserError, match="not finite"):
        contraction(model, BATCHES, 2)
