"""Confidence exits: what they look at, what they refuse, and their fixed point, which is the sequential model."""

import math
from itertools import pairwise

import pytest
import torch

from megatron_ponder.base.errors import UserError
from megatron_ponder.generation.generator import Generator
from megatron_ponder.model.exits import Exit
from megatron_ponder.model.fixed_point import settle
from tests.generation.sequential import decode
from tests.models import random_tokens, small_model


@pytest.mark.parametrize(("measure", "threshold"), [("entropy", 3.32), ("margin", 0.05)])
@pytest.mark.parametrize("eod_id", [None, 7])
@torch.no_grad()
def test_exact_equals_sequential(measure, threshold, eod_id):
    model = exiting_model(eod_id=eod_id)
    tokens = random_tokens(2, 18)
    tokens[0, [4, 5, 11]] = 7
    rule = model.rule("hard", exit=Exit(measure, threshold))
    got = model.exact(tokens, rule)
    for row in range(2):
        want, executed = decode(model, rule, tokens[row])
        assert torch.equal(got.routing.executed[row], executed)
        assert (got.output_BLH[row] - want).abs().max() < 1e-11
    assert len(got.routing.executed.unique()) == 4
    pruned = torch.arange(4) > got.routing.executed.unsqueeze(-1)
    assert not got.hidden_BLSH[pruned].any() and got.hidden_BLSH[~pruned].all()
    one = settle(model, *model.read(tokens), rule, 1e-14, 1)  # token by token, each slot once
    assert torch.equal(one.slots_PB.sum(0), (got.routing.executed + 1).sum(1))


@pytest.mark.parametrize(
    ("exit", "steps"),
    [("entropy:0", 3), ("entropy:inf", 0), ("margin:inf", 3), ("margin:1.1", 3), ("margin:0", 0)],
)
@torch.no_grad()
def test_ends_of_the_thresholds_are_all_steps_and_none(exit, steps):
    model, tokens = exiting_model(), random_tokens(2, 9)
    got = model.exact(tokens, model.rule("hard", exit=Exit.read(exit)))
    assert (got.routing.executed == steps).all()
    want = model.exact(tokens, model.rule("hard" if steps else "none"))
    assert (got.output_BLH - want.output_BLH).abs().max() < 1e-12


@torch.no_grad()
def test_higher_thresholds_stop_sooner_at_the_first_token():
    """Later tokens see other slots when those before them stop elsewhere, the first one does not."""
    model, tokens = exiting_model(), random_tokens(40, 1)
    rules = [model.rule("hard", exit=Exit("entropy", nats)) for nats in (3, 3.2, 3.4, 4)]
    steps = [model.exact(tokens, rule).routing.executed for rule in rules]
    assert all((more >= fewer).all() for more, fewer in pairwise(steps))
    assert steps[0].sum() > steps[-1].sum()


def test_entropy_is_in_nats_and_what_is_no_number_goes_on():
    even, sure = torch.zeros(1, 8), torch.tensor([[0.0, -math.inf]])
    for nats, stops in ((math.log(8) + 1e-6, True), (math.log(8) - 1e-6, False)):
        assert Exit("entropy", nats).confident(even).item() == stops
    assert Exit("margin", 0.0).confident(even) and not Exit("margin", 1e-6).confident(even)
    assert Exit("entropy", 1e-9).confident(sure) and Exit("margin", 1.0).confident(sure)
    assert not any(Exit(measure, 1.0).confident(even * math.nan) for measure in ("entropy", "margin"))


@pytest.mark.parametrize("text", ["entropy", "margin:", "entropy:x", "entropy:nan", "margin:-0.1", "doubt:0.5", ""])
def test_other_texts_are_refused(text):
    with pytest.raises(UserError, match=r"choose entropy:X"):
        Exit.read(text)


@pytest.mark.parametrize("mode", ["vanilla", "adaptive", "pause", "sps", "loop", "ponderlm", "fixed"])
def test_other_models_are_refused(mode):
    own = {"ponder__latent_visibility": "own"} if mode == "fixed" else {}
    model, other = small_model(ponder__mode=mode, **own), "whose latents" if own else f"of mode {mode}"
    rule = model.rule("hard", exit=Exit("entropy", 1.0))
    for use in (lambda: model.exact(random_tokens(1, 2), rule), lambda: Generator(model, rule=rule)):
        with pytest.raises(UserError, match=f"mode fixed, not for one {other}"):
            use()


def exiting_model(**overrides):
    """A model whose tokens take all numbers of steps by the thresholds above."""
    model = small_model(ponder__mode="fixed", ponder__latent_steps=3, **overrides).eval()
    with torch.no_grad():
        model.head.weight *= 12
    return model
