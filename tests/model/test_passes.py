"""The chain of passes, the interleaving, positions and document masks, each against a naive loop."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ponder.config import ModelConfig
from megatron_ponder.model.passes import PassState, enter_pass, interleaving, leave_pass, pass_slots
from megatron_ponder.model.rope import rotation

EOD = 7
unhurried = settings(deadline=None)  # first calls of torch are slow
token_batches = st.integers(1, 9).flatmap(
    lambda length: st.lists(
        st.lists(st.sampled_from([1, 2, EOD]), min_size=length, max_size=length), min_size=1, max_size=3
    )
)


@unhurried
@given(steps=st.integers(1, 8), refinements=st.integers(0, 8))
def test_cost_of_the_passes(steps, refinements):
    slots = pass_slots(steps, refinements)
    assert sum(slots) == steps * (steps + 1) // 2 + (refinements + 1) * (steps + 1)
    assert len(slots) == steps + refinements + 1
    assert slots[:steps] == tuple(range(1, steps + 1))
    assert set(slots[steps:]) == {steps + 1}
    assert all(after - before in (0, 1) for before, after in itertools.pairwise(slots))


@unhurried
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


def test_positions_without_documents():
    layout = interleaving(torch.tensor([[EOD, 1, EOD, 2]]), None)
    assert layout.positions_BL.tolist() == [[0, 1, 2, 3]]
    assert layout.mask(3) is None


@unhurried
@given(batch=token_batches, slots=st.integers(1, 3))
def test_positions_and_masks_of_documents(batch, slots):
    layout = interleaving(torch.tensor(batch), EOD)
    for row, tokens in enumerate(batch):
        position, document, positions, documents = 0, 0, [], []
        for token in tokens:
            positions.append(position)
            documents.append(document)
            position += 1
            if token == EOD:  # belongs to the document that it ends
                position, document = 0, document + 1
        assert layout.positions_BL[row].tolist() == positions
        mask = layout.mask(slots)[row, 0]
        assert mask.shape == (len(tokens) * slots, len(tokens) * slots)
        for query in range(len(tokens) * slots):
            for key in range(len(tokens) * slots):
                visible = key <= query and documents[key // slots] == documents[query // slots]
                assert bool(mask[query, key]) == visible


@pytest.mark.parametrize("slots", [1, 2, 4])
@pytest.mark.parametrize("rotary_fraction", [1.0, 0.25])
def test_all_slots_of_a_token_have_its_position(slots, rotary_fraction):
    config = ModelConfig(hidden_size=32, num_heads=2, rotary_fraction=rotary_fraction)
    layout = interleaving(torch.tensor([[1, EOD, 1, 2], [1, 1, 1, 1]]), EOD)
    expected = layout.positions_BL.repeat_interleave(slots, 1)
    got = layout.angles(slots, config, torch.float64)
    want = rotation(expected, int(16 * rotary_fraction), config.rope_theta, torch.float64)
    assert torch.equal(got.cos, want.cos)
    assert torch.equal(got.sin, want.sin)
    assert layout.angles(slots, config, torch.float64) is got
