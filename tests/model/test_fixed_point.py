"""Sweeps to the fixed point against Jacobi passes that come to it, and what they run."""

import math
from dataclasses import replace

import pytest
import torch

from megatron_ponder.model.fixed_point import settle
from tests.grids import in_pairs
from tests.models import random_tokens, small_model

EOD, TOLERANCE = 7, 1e-14


def model_and_tokens(mode="adaptive", eod_id=None, **overrides):
    """A model and two sequences, of three documents and of one."""
    tokens = random_tokens(2, 7)
    tokens[0, [2, 3]] = EOD
    tokens[1] = tokens[1].where(tokens[1] != EOD, 0)
    return small_model(router_scale=4.0, eod_id=eod_id, ponder__mode=mode, **overrides), tokens


@torch.no_grad()
@pytest.mark.parametrize(
    ("way", "eod_id", "window"),
    in_pairs([("fixed", "hard"), ("adaptive", "soft"), ("adaptive", "hard")], [None, EOD], [1, 3, 100]),
)
def test_sweeps_settle_where_passes_do(way, eod_id, window):
    mode, kind = way
    model, tokens = model_and_tokens(mode, eod_id, model__num_kv_heads=2)
    rule = model.rule(kind, threshold=0.2)
    want = model.jacobi(tokens, 21, rule)  # as many passes as there are slots
    got = settle(model, *model.read(tokens), rule, TOLERANCE, window)
    assert (model.fuse(got.hidden_BLSH, got.routing, rule) - want.output_BLH).abs().max() < 1e-11
    slots_B = torch.full((2,), 21)
    if got.routing is not None:
        for own, other in zip(got.routing, want.routing, strict=True):
            assert (own - other).abs().max() < 1e-11
        if kind == "hard":
            assert len(got.routing.executed.unique()) == 3
            slots_B = (got.routing.executed + 1).sum(1)
            pruned = torch.arange(3) > got.routing.executed.unsqueeze(-1)
            assert not got.hidden_BLSH[pruned].any()
    if window == 1:  # slot by slot, each of them once, which is sequential decoding
        assert torch.equal(got.slots_PB.sum(0), slots_B)
        assert len(got.slots_PB) == tokens.numel()


@torch.no_grad()
@pytest.mark.parametrize("routes_by", ["hidden", "token"])
def test_steps_that_are_given_are_those_that_run(routes_by):
    model, tokens = model_and_tokens(ponder__router_input=routes_by)
    executed = torch.randint(0, 3, tokens.shape, generator=torch.Generator().manual_seed(1))
    rule = replace(model.rule("hard", threshold=0.2), executed=executed)
    want, got = model.jacobi(tokens, 21, rule), model.exact(tokens, rule)
    assert torch.equal(got.routing.executed, executed)
    assert (got.output_BLH - want.output_BLH).abs().max() < 1e-11


@torch.no_grad()
def test_a_large_tolerance_ends_sooner_and_further_away():
    model, tokens = model_and_tokens()
    rule = model.rule("soft")
    exact, rough = model.exact(tokens, rule), model.exact(tokens, rule, tolerance=0.05)
    assert rough.passes < exact.passes
    assert 1e-9 < (rough.output_BLH - exact.output_BLH).abs().max() < 0.5


@torch.no_grad()
def test_what_is_not_a_number_ends_at_once():
    model, tokens = model_and_tokens()
    model.embedding.weight[tokens[0, 3]] = math.nan
    output = model.exact(tokens, model.rule("hard"))
    assert output.passes < tokens.numel()
    assert output.output_BLH[0, 3:].isnan().all()
