"""Positions and segments against a naive loop."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_ponder.config import ModelConfig
from megatron_ponder.model.geometry import Geometry
from megatron_ponder.model.rope import rotation

EOD = 7
token_batches = st.integers(1, 9).flatmap(
    lambda length: st.lists(
        st.lists(st.sampled_from([1, 2, EOD]), min_size=length, max_size=length), min_size=1, max_size=3
    )
)


def test_positions_without_documents():
    geometry = Geometry.of(torch.tensor([[EOD, 1, EOD, 2]]), None)
    assert geometry.positions_BL.tolist() == [[0, 1, 2, 3]]
    assert geometry.segments(3) is None


@given(batch=token_batches, slots=st.integers(1, 3))
def test_positions_and_segments_of_documents(batch, slots):
    geometry = Geometry.of(torch.tensor(batch), EOD)
    bounds = [0]
    for row, tokens in enumerate(batch):
        position, positions = 0, []
        for index, token in enumerate(tokens, 1):
            positions.append(position)
            position += 1
            if token == EOD or index == len(tokens):  # an end belongs to the document that it ends
                bounds.append(bounds[-1] + position)
                position = 0
        assert geometry.positions_BL[row].tolist() == positions
    segments = geometry.segments(slots)
    assert segments.bounds.tolist() == [slots * bound for bound in bounds]
    assert segments.longest == slots * len(batch[0])
    for begin, end in pairwise(segments.bounds.tolist()):
        assert (segments.starts[begin:end] == begin).all() and (segments.ends[begin:end] == end).all()


@pytest.mark.parametrize("slots", [1, 2, 4])
@pytest.mark.parametrize("rotary_fraction", [1.0, 0.25])
def test_all_slots_of_a_token_have_its_position(slots, rotary_fraction):
    config = ModelConfig(hidden_size=32, num_heads=2, head_size=16, rotary_fraction=rotary_fraction)
    geometry = Geometry.of(torch.tensor([[1, EOD, 1, 2], [1, 1, 1, 1]]), EOD)
    expected = geometry.positions_BL.repeat_interleave(slots, 1)
    got = geometry.angles(slots, config, torch.float64)
    want = rotation(expected, config, torch.float64)
    assert torch.equal(got.cos, want.cos)
    assert torch.equal(got.sin, want.sin)
    assert geometry.angles(slots, config, torch.float64) is got
