"""The chain of passes and the interleaved sequence, each against a naive loop."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_ponder.model.passes import PassState, enter_pass, leave_pass, pass_slots


@given(steps=st.integers(1, 8), refinements=st.integers(0, 8))
def test_cost_of_the_passes(steps, refinements):
    slots = pass_slots(steps, refinements)
    assert sum(slots) == steps * (steps + 1) // 2 + (refinements + 1) * (steps + 1)
    assert len(slots) == steps + refinements + 1
    assert slots[:steps] == tuple(range(1, steps + 1))
    assert set(slots[steps:]) == {steps + 1}
    assert all(after - before in (0, 1) for before, after in itertools.pairwise(slots))


@given(refinements=st.integers(0, 8))
def test_no_steps_take_one_pass(refinements):
    assert pass_slots(0, refinements) == (1,)


@pytest.mark.parametrize("latents", [0, 1, 3])
def test_order_of_the_interleaved_sequence(latents):
    batch, length, hidden = 2, 4, 3
    embedded = torch.randn(batch, length, hidden)
    z = torch.randn(batch, length, latents, hidden) if latents else None
    log_w = torch.randn(batch, length, latents + 1) if latents else None
    x, log_w_BT = enter_pass(embedded, PassState(z, log_w))
    assert x.shape == (batch, length * (latents + 1), hidden)
    for row in range(batch):
        expected, weights = [], []
        for t in range(length):
            expected.append(embedded[row, t])
            expected += [z[row, t, k] for k in range(latents)]
            weights += [log_w[row, t, k] for k in range(latents + 1)] if latents else []
        assert torch.equal(x[row], torch.stack(expected))
        assert log_w_BT is None if not latents else torch.equal(log_w_BT[row], torch.stack(weights))


@pytest.mark.parametrize(("slots", "following"), [(1, 2), (2, 3), (3, 3), (1, 1)])
def test_latents_are_the_hidden_states_of_the_slots_before(slots, following):
    hidden, log_w = torch.randn(2, 4, slots, 3), torch.randn(2, 4, 3)
    state = leave_pass(hidden, log_w, following)
    assert state.latents.shape[2] == following - 1
    for k in range(1, following):
        assert torch.equal(state.latents[:, :, k - 1], hidden[:, :, k - 1])
    assert torch.equal(state.log_w, log_w[:, :, :following])
    assert leave_pass(hidden, None, following).log_w is None
