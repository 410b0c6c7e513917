"""The baselines' passes are what token-by-token definitions give, in every way of running them."""

from typing import get_args

import pytest
import torch
import torch.nn.functional as F
from torch.autograd.gradcheck import gradcheck

from megatron_ponder.config import PonderConfig
from megatron_ponder.config.ponder import Mode
from megatron_ponder.evaluation.inference_flops import inference_flops
from megatron_ponder.evaluation.perplexity import settings
from megatron_ponder.model import modes
from megatron_ponder.model.geometry import Geometry
from megatron_ponder.model.modes import passes_of
from megatron_ponder.model.modes.ponderlm import CANDIDATES
from megatron_ponder.parallel.candidates import likeliest
from megatron_ponder.parallel.mesh import Axis
from megatron_ponder.training.objective import Objective
from tests.generation.sequential import decode
from tests.models import random_tokens, small_config, small_model

BASELINES = ("pause", "sps", "loop", "ponderlm")
PAUSES = ("pause", "sps")
VOCABULARY = 173  # more than the likeliest that a prediction is read through
EOD = 7


def baseline(mode: str, family: str = "llama", steps: int = 2, eod_id: int | None = None, **overrides):
    values = {"model__vocab_size": VOCABULARY, "ponder__latent_steps": steps} | overrides
    model = small_model(seed=steps, eod_id=eod_id, model__family=family, ponder__mode=mode, **values)
    with torch.no_grad():  # predictions that differ from token to token
        model.head.weight.mul_(20)
    return model


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
@pytest.mark.parametrize("mode", BASELINES)
@pytest.mark.parametrize("steps", [1, 3])
def test_the_passes_are_the_sequential_definition(mode, family, steps):
    model, tokens = baseline(mode, family, steps), random_tokens(1, 24, VOCABULARY)
    rule = model.rule("hard")
    want, executed = decode(model, rule, tokens[0])
    assert executed.tolist() == [steps] * 24
    for got in (model.jacobi(tokens, 2, rule), model.exact(tokens, rule)):
        assert got.passes == (1 if mode in PAUSES else steps + 1)
        assert (model.head(got.output_BLH[0]) - model.head(want)).abs().max() < 1e-9


@pytest.mark.parametrize("mode", BASELINES)
def test_documents_are_confined(mode):
    model, tokens = baseline(mode, eod_id=EOD), random_tokens(1, 20, VOCABULARY)
    tokens[0, [5, 6, 13]] = EOD
    rule = model.rule("hard")
    want, _ = decode(model, rule, tokens[0])
    assert (model.exact(tokens, rule).output_BLH[0] - want).abs().max() < 1e-9


@pytest.mark.parametrize("mode", BASELINES)
def test_a_token_changes_nothing_before_it(mode):
    model, tokens = baseline(mode), random_tokens(2, 12, VOCABULARY)
    rule = model.rule("hard")
    changed = tokens.clone()
    changed[:, 7] = (changed[:, 7] + 1) % VOCABULARY
    before, after = (model.jacobi(ids, 0, rule).output_BLH for ids in (tokens, changed))
    difference = (after - before).abs().amax((0, 2))
    assert difference[:7].max() < 1e-12
    assert difference[7:].min() > 1e-6


def test_each_step_matters():
    """Tokens and weights alike, the modes and their numbers of steps give different outputs."""
    tokens = random_tokens(1, 9, VOCABULARY)
    outputs = []
    for mode in (*BASELINES, "vanilla"):
        for steps in (1, 2):
            model = baseline(mode, steps=steps, ponder__embedding_scale=9.0)
            with torch.no_grad():
                for parameter in model.parameters():
                    torch.manual_seed(0)
                    parameter.normal_(0, parameter.shape[-1] ** -0.5)
            outputs.append(model.jacobi(tokens, 0, model.rule("hard")).output_BLH)
    vanilla = outputs[-2:]
    assert torch.equal(*vanilla)
    for index, one in enumerate(outputs[:-1]):
        assert all((one - other).abs().max() > 1e-3 for other in outputs[:index])


def naive_loss(model, tokens):
    """Every pass written out over the whole sequence, with the unrestricted vocabulary sorted anew."""
    e = model.embedding.weight[tokens[:, :-1]] * model.ponder_config.embedding_scale
    passes, x = model.ponder_config.steps + 1, e
    for index in range(passes):
        h = model.transformer(x, slots_of(model, tokens.shape[1] - 1))
        if model.ponder_config.mode == "loop":
            x = h
        elif index + 1 < passes:
            logits = h @ model.head.weight.T
            top = logits.argsort(-1, descending=True)[..., :CANDIDATES]
            p = torch.zeros_like(logits).scatter(-1, top, logits.gather(-1, top).softmax(-1))
            x = x + p @ model.embedding.weight * model.ponder_config.embedding_scale
    return F.cross_entropy((h @ model.head.weight.T).flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum")


def slots_of(model, length: int):
    from megatron_ponder.model.attention import Slots

    geometry = Geometry.of(torch.zeros(1, length, dtype=torch.long), None)
    return Slots(length, geometry.angles(1, model.model_config, torch.float64))


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
@pytest.mark.parametrize("mode", ["loop", "ponderlm"])
def test_gradients_are_those_of_a_naive_loop(mode, family):
    model, tokens = baseline(mode, family), random_tokens(2, 9, VOCABULARY)
    expected = torch.autograd.grad(naive_loss(model, tokens), list(model.parameters()))
    loss, _ = Objective(model)(tokens, 1, model.rule("soft"))
    got = torch.autograd.grad(loss, list(model.parameters()))
    assert loss.item() == pytest.approx(naive_loss(model, tokens).item(), rel=1e-12)
    for (name, _), one, other in zip(model.named_parameters(), got, expected, strict=True):
        assert other.norm() > 0
        assert (one - other).norm() / other.norm() < 1e-10, name


@pytest.mark.parametrize("mode", BASELINES)
def test_gradients_of_embeddings_by_finite_differences(mode):
    model, tokens = baseline(mode, steps=1), random_tokens(1, 4, VOCABULARY)
    parameter = model.pauses.weight if mode in PAUSES else model.embedding.weight
    direction = torch.randn(parameter.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    start = parameter.detach().clone()

    def loss(step):
        with torch.no_grad():
            parameter.copy_(start + step.detach() * direction)
        return Objective(model)(tokens, 0, model.rule("soft"))[0]

    loss(torch.zeros(())).backward()
    slope = (parameter.grad * direction).sum()
    with torch.no_grad():
        size = torch.tensor(1e-6, dtype=torch.float64)
        difference = (loss(size) - loss(-size)) / (2 * size)
    assert slope.item() == pytest.approx(difference.item(), rel=1e-6)


def test_gradient_passes_cut_the_earlier_ones_off():
    model, tokens = baseline("loop"), random_tokens(1, 6, VOCABULARY)
    Objective(model)(tokens, 0, model.rule("soft"))[0].backward()
    whole = model.embedding.weight.grad.norm()
    model.zero_grad()
    result = model.jacobi(tokens, 0, model.rule("soft"), gradient_passes=1)
    model.head(result.output_BLH).sum().backward()
    assert whole > 0
    assert model.embedding.weight.grad is None


# Everything else is shared


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_baselines_begin_as_the_paper_s_modes_do(family):
    from megatron_ponder.model.ponder import PonderLM
    from megatron_ponder.parallel.sharding import initialize

    models = {}
    for mode in ("fixed", *BASELINES):
        config = small_config(model__family=family, model__hidden_size=512, ponder__mode=mode)
        models[mode] = PonderLM(config.model, config.ponder)
        initialize(models[mode], seed=3)
    fixed = dict(models["fixed"].named_parameters())
    for mode in BASELINES:
        own = dict(models[mode].named_parameters())
        assert own.keys() - fixed.keys() == ({"pauses.weight"} if mode in PAUSES else set())
        assert all(torch.equal(own[name], weight) for name, weight in fixed.items())
        assert models[mode].ponder_config.embedding_scale == models["fixed"].ponder_config.embedding_scale
    pauses = models["pause"].pauses(models["pause"].ponder_config.embedding_scale)
    assert pauses.shape == (2, 512)
    assert pauses.square().mean(1).sqrt().tolist() == pytest.approx([1, 1], rel=0.1)


def test_what_a_cache_keeps():
    alone, others = (passes_of(small_config(ponder__mode=mode).ponder) for mode in ("sps", "pause"))
    assert (alone.kv_entries(1.5), others.kv_entries(1.5)) == (1, 2.5)
    assert (alone.cached_slots([2, 2]), others.cached_slots([2, 2])) == (2, 6)
    assert (alone.most_slots(5), others.most_slots(5)) == (7, 15)


@pytest.mark.parametrize("mode", BASELINES)
def test_one_row_of_evaluation(mode):
    assert [setting.name for setting in settings(baseline(mode), None, None, [0, 3])] == ["hard, exact"]


@pytest.mark.parametrize("mode", BASELINES)
def test_plans(mode):
    passes = passes_of(small_config(ponder__mode=mode, ponder__latent_steps=3).ponder)
    for refinements in (0, 2):
        assert passes.plan(refinements) == ((4,) if mode in PAUSES else (1, 1, 1, 1))


@pytest.mark.parametrize("mode", BASELINES)
def test_flops_by_a_loop_over_cached_slots(mode):
    model = baseline(mode, steps=2)
    config, got = model.model_config, inference_flops(torch.full((1, 5), 2), model)
    blocks = sum(parameter.numel() for parameter in model.transformer.blocks.parameters())
    keys = [0] * 3
    for position in range(5):
        want = 0
        for step in range(3):
            cache = 0 if mode in PAUSES else step
            keys[cache] += 1
            want += 2 * blocks + 4 * config.num_layers * config.hidden_size * keys[cache]
            if mode == "ponderlm" and step < 2:
                want += 2 * VOCABULARY * config.hidden_size + 2 * CANDIDATES * config.hidden_size
        if mode == "sps":
            keys[0] -= 2  # pauses, which no other token sees
        assert got[0, position] == want + 2 * VOCABULARY * config.hidden_size


# The likeliest tokens


def test_likeliest_tokens_leave_padding_out():
    logits = torch.tensor([[1.0, 5.0, 3.0, 9.0, 9.0]])
    values, ids = likeliest(logits, 2, Axis(), vocab_size=3)
    assert values.tolist() == [[5.0, 3.0]] and ids.tolist() == [[1, 2]]
    assert likeliest(logits, 100, Axis(), vocab_size=3)[1].tolist() == [[1, 2, 0]]


def test_mixtures_have_the_gradients_of_their_formula():
    model = baseline("ponderlm")
    ids = random_tokens(2, 15, VOCABULARY).view(2, 3, 5)
    weights = torch.rand(2, 3, 5, dtype=torch.float64, requires_grad=True)
    want = (weights.unsqueeze(-1) * model.embedding.weight[ids]).sum(2)
    assert (model.embedding(ids, weights) - want).abs().max() < 1e-12
    assert gradcheck(lambda w: model.embedding(ids, w), (weights,))


def test_the_configuration_names_the_modes_that_there_are():
    assert {mode: passes_of(PonderConfig(mode=mode)).steps for mode in get_args(Mode)} == {
        mode: 0 if mode == "vanilla" else 3 for mode in modes._PASSES
    }
