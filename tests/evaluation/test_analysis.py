"""Tables and summary of small models, against loops over their tokens."""

from pathlib import Path

import numpy as np
import pytest

from megatron_ponder.evaluation.analysis import analyse
from megatron_ponder.evaluation.analysis_plan import AnalysisPlan, Subject
from megatron_ponder.evaluation.perplexity import Setting, evaluate
from megatron_ponder.evaluation.pondering import contraction, measure, shuffled
from megatron_ponder.evaluation.statistics import rank_correlation
from megatron_ponder.model.exits import Exit
from tests.models import random_tokens, small_model

BATCHES = [random_tokens(2, 21, seed=0), random_tokens(1, 12, seed=1)]
DEPTHS = [random_tokens(2, 21, vocab_size=4, seed=2) - 1, random_tokens(1, 12, vocab_size=4, seed=3) - 1]
SWEEPS = {"thresholds": (0.2, 0.6), "biases": (-2.0, 2.0), "entropies": (0.0, 1000.0), "margins": (0.001,)}
PLAN = AnalysisPlan(refinements=1, random_draws=2, iterations=3, listed=30, **SWEEPS)
LABELS = {"a": "adaptive", "f": "fixed", "v": "vanilla"}


@pytest.fixture(scope="module")
def subjects() -> dict[str, Subject]:
    models = {
        label: small_model(router_scale=4.0, ponder__mode=mode, inference__threshold=0.3).eval()
        for label, mode in LABELS.items()
    }
    return {label: Subject(label, model, Path("runs") / label, 2) for label, model in models.items()}


@pytest.fixture(scope="module")
def announced() -> list[str]:
    return []


@pytest.fixture(scope="module")
def analysis(subjects, announced):
    return analyse(list(subjects.values()), BATCHES, PLAN, "<{}>".format, DEPTHS, announced.append)


@pytest.fixture(scope="module")
def own(subjects):
    """The adaptive model as it was trained."""
    model = subjects["a"].model
    return measure(model, BATCHES, Setting(model.rule("hard"), 1))


def rows_of(analysis, table, **values):
    return [row for row in analysis.tables[table] if all(row[name] == value for name, value in values.items())]


def test_exits_of_a_fixed_model_are_exact_and_of_no_other(analysis, subjects):
    model, rows = subjects["f"].model, analysis.tables["quality_compute"]
    exits = [row for row in rows if row["sweep"] in ("entropy", "margin")]
    wanted = [("entropy", 0.0), ("entropy", 1000.0), ("margin", 0.001)]
    assert [(row["model"], row["sweep"], row["threshold"]) for row in exits] == [("f", *exit) for exit in wanted]
    for row in exits:
        exit = Exit(row["sweep"], row["threshold"])
        want = evaluate(model, BATCHES, Setting(model.rule("hard", exit=exit), None))
        assert row["evaluation"] == f"{exit}, exact" == want.setting
        assert row["loss"] == pytest.approx(want.cross_entropy)
        assert row["mflops"] == pytest.approx(want.flops / 1e6)
        assert row["mean_steps"] == pytest.approx(want.mean_steps)
    assert [row["mean_steps"] for row in exits[:2]] == [2, 0]
    assert 0 < exits[2]["mean_steps"] < 2


def test_what_comes_is_announced(subjects, announced, analysis):
    for label, subject in subjects.items():
        assert PLAN.measurements(subject) == sum(line.startswith(f"{label}: ") for line in announced)


def test_quality_and_compute(analysis, subjects):
    model = subjects["a"].model
    for sweep, name, values in (("threshold", "threshold", [0.2, 0.3, 0.6]), ("bias", "bias", [-2.0, 0.0, 2.0])):
        rows = rows_of(analysis, "quality_compute", model="a", sweep=sweep)
        assert [row[name] for row in rows] == values
        for row in rows:
            rule = model.rule("hard", row["threshold"], row["bias"])
            want = evaluate(model, BATCHES, Setting(rule, 1))
            assert row["evaluation"] == "hard, jacobi(1)"
            assert row["loss"] == pytest.approx(want.cross_entropy)
            assert row["mean_steps"] == pytest.approx(want.mean_steps)
            assert row["mflops"] == pytest.approx(want.flops / 1e6)
            if sweep == "threshold":
                measured = measure(model, BATCHES, Setting(rule, 1))
                controls = rows_of(analysis, "quality_compute", sweep="random", threshold=row["threshold"])
                assert [control["seed"] for control in controls] == [0, 1]
                for control in controls:
                    assert control["mean_steps"] == pytest.approx(want.mean_steps)
                    drawn = measure(model, BATCHES, Setting(shuffled(measured, control["seed"]), 1))
                    assert control["loss"] == pytest.approx(drawn.loss.mean())
    for label, steps in (("f", 2), ("v", 0)):
        (row,) = rows_of(analysis, "quality_compute", model=label, sweep="trained")
        assert (row["mean_steps"], row["threshold"]) == (steps, None)
        want = evaluate(subjects[label].model, BATCHES, Setting(model.rule("hard"), 1))
        assert row["loss"] == pytest.approx(want.cross_entropy)


def test_shifts_of_each_half(analysis, subjects, own):
    hard = own.first_loss > np.median(own.first_loss)
    assert hard.sum() == len(hard) // 2
    model = subjects["a"].model
    for bias in (-2.0, 0.0, 2.0):
        shifted = measure(model, BATCHES, Setting(model.rule("hard", bias=bias), 1))
        for name, half in (("easy", ~hard), ("hard", hard)):
            (row,) = rows_of(analysis, "shifting", model="a", bias=bias, half=name)
            assert row["loss"] == pytest.approx(shifted.loss[half].mean())
            assert row["loss_change"] == pytest.approx((shifted.loss - own.loss)[half].mean(), abs=1e-12)
            assert row["mean_steps"] == pytest.approx(shifted.executed.mean())
            assert row["half_mean_steps"] == pytest.approx(shifted.executed[half].mean())
    assert len(analysis.tables["shifting"]) == 6


def test_benefit_by_executed_steps(analysis, own):
    rows = rows_of(analysis, "benefit", model="a")
    assert [row["steps"] for row in rows] == [0, 1, 2]
    for row in rows:
        tokens = [index for index, steps in enumerate(own.executed) if steps == row["steps"]]
        gains = [own.first_loss[index] - own.loss[index] for index in tokens]
        assert row["tokens"] == len(tokens)
        assert row["gain"] == pytest.approx(sum(gains) / len(gains))
        assert row["gain_standard_error"] == pytest.approx(np.std(gains, ddof=1) / len(gains) ** 0.5)
        assert row["first_loss"] == pytest.approx(np.mean([own.first_loss[index] for index in tokens]))
    assert rows[0]["gain"] == pytest.approx(0, abs=1e-12)  # no step, nothing gained
    assert "mode fixed shows no prediction from before its steps" in str(analysis.summary["f"]["missing"])
    assert "what the steps gain: there are none" in analysis.summary["v"]["missing"]


def test_difficulty_and_its_control_by_identity(analysis, own):
    of_token = {}
    for token, steps in zip(own.tokens, own.executed, strict=True):
        of_token.setdefault(token, []).append(steps)
    by_identity = np.array([np.mean(of_token[token]) for token in own.tokens])
    order = np.argsort(own.first_loss, kind="stable")
    rows = rows_of(analysis, "difficulty", model="a")
    assert [row["tokens"] for row in rows] == [6, 5, 5, 5, 5, 5, 5, 5, 5, 5]
    begin = 0
    for row in rows:
        chosen = order[begin : begin + row["tokens"]]
        assert row["first_loss"] == pytest.approx(own.first_loss[chosen].mean())
        assert row["mean_steps"] == pytest.approx(own.executed[chosen].mean())
        assert row["mean_steps_by_identity"] == pytest.approx(by_identity[chosen].mean())
        begin += row["tokens"]
    found = analysis.summary["a"]["difficulty"]
    assert found["rank_correlation"] == pytest.approx(rank_correlation(own.executed, own.first_loss))
    assert found["rank_correlation_by_identity"] == pytest.approx(rank_correlation(by_identity, own.first_loss))
    beyond = rank_correlation(own.executed - by_identity, own.first_loss)
    assert found["rank_correlation_beyond_identity"] == pytest.approx(beyond)
    assert found["rank_correlation_with_gain"] == pytest.approx(rank_correlation(own.executed, own.gain))
    assert found["different_tokens"] == len(of_token)


def test_tokens_and_their_strings(analysis, own):
    rows = rows_of(analysis, "tokens", model="a")
    assert [row["token"] for row in rows] == [f"<{token}>" for token in own.tokens[:30]]
    for index, row in enumerate(rows):
        assert row["next"] == f"<{own.labels[index]}>"
        assert (row["steps"], row["loss"]) == (own.executed[index], own.loss[index])
        assert [row[f"s_{step}"] for step in range(3)] == own.distribution[index].tolist()
    assert "s_0" not in rows_of(analysis, "tokens", model="f")[0]

    strings = rows_of(analysis, "token_strings", model="a")
    assert sum(row["count"] for row in strings) == len(own.tokens)
    assert [row["mean_steps"] for row in strings] == sorted((row["mean_steps"] for row in strings), reverse=True)
    for row in strings:
        chosen = own.tokens == row["id"]
        assert row["count"] == chosen.sum()
        assert row["mean_steps"] == pytest.approx(own.executed[chosen].mean())
        assert row["gain"] == pytest.approx(own.gain[chosen].mean())


def test_gaps_are_differences_of_evaluations(analysis, subjects):
    for label, thresholds in (("a", [1e-4, 0.3]), ("f", [None])):
        model = subjects[label].model

        def loss(name, threshold, model=model):
            rule, evaluation = name.split(", ")
            refinements = None if evaluation == "exact" else int(evaluation[7:-1])
            setting = Setting(model.rule(rule, threshold), refinements)
            return evaluate(model, BATCHES, setting).cross_entropy

        gaps = analysis.summary[label]["gaps"]
        jacobi = ["hard, jacobi(0)", "hard, jacobi(2)", "hard, jacobi(3)"]
        names = [*(["hard, exact"] if label == "a" else []), *jacobi]
        assert [(gap["threshold"], gap["of"]) for gap in gaps] == [(t, name) for t in thresholds for name in names]
        for gap in gaps:
            assert gap["from"] == ("soft, exact" if gap["of"] == "hard, exact" else "hard, exact")
            want = loss(gap["of"], gap["threshold"]) - loss(gap["from"], gap["threshold"])
            assert gap["loss"] == pytest.approx(want, abs=1e-10)
    assert "gaps" not in analysis.summary["v"]


def test_latents_of_a_token_s_own_have_a_gap_by_the_hard_rule_and_no_iterates(tmp_path):
    values = {"ponder__mode": "adaptive", "ponder__latent_visibility": "own", "inference__threshold": 0.3}
    model = small_model(router_scale=4.0, **values).eval()
    analysis = analyse([Subject("o", model, tmp_path, 0)], BATCHES, PLAN, str)
    found = {gap["threshold"]: gap for gap in analysis.summary["o"]["gaps"]}
    assert list(found) == [1e-4, 0.3] and "contraction" not in analysis.summary["o"]
    for threshold, gap in found.items():
        hard, soft = (evaluate(model, BATCHES, Setting(model.rule(kind, threshold), None)) for kind in ("hard", "soft"))
        assert (gap["of"], gap["from"]) == ("hard, exact", "soft, exact")
        assert gap["loss"] == pytest.approx(hard.cross_entropy - soft.cross_entropy, abs=1e-10)
    assert abs(found[0.3]["loss"]) > 1e-6


def test_contraction_is_that_of_the_first_batch(analysis, subjects):
    for label in ("a", "f"):
        found = contraction(subjects[label].model, BATCHES[:1], 3)
        assert [row["rmse"] for row in rows_of(analysis, "contraction", model=label)] == found.rmse
        assert analysis.summary[label]["contraction"]["factor"] == found.factor
    assert "contraction" not in analysis.summary["v"]
    assert "the same for every R" in str(analysis.summary["v"]["missing"])


def test_depths(analysis, own):
    stated = np.concatenate([batch[:, 1:].flatten().numpy() for batch in DEPTHS])
    rows = rows_of(analysis, "depth", model="a")
    assert [row["depth"] for row in rows] == [None, 0, 1, 2]
    for row in rows:
        chosen = stated == (-1 if row["depth"] is None else row["depth"])
        assert row["tokens"] == chosen.sum()
        assert row["loss"] == pytest.approx(own.loss[chosen].mean())
        assert row["mean_steps"] == pytest.approx(own.executed[chosen].mean())
    answers = stated >= 0
    found = analysis.summary["a"]["depth"]
    assert found["rank_correlation"] == pytest.approx(rank_correlation(own.executed[answers], stated[answers]))
    assert found["mean_steps_of_others"] == pytest.approx(own.executed[~answers].mean())
    assert {row["model"] for row in analysis.tables["depth"]} == set(LABELS)


def test_without_depths_there_is_no_such_table(subjects):
    found = analyse([subjects["v"]], BATCHES, PLAN, str)
    assert set(found.tables) == {"tokens", "quality_compute"}
