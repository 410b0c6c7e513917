"""Sums of a loss come back under the names that they were packed under."""

import pytest
import torch

from megatron_ponder.model.tally import BY_STEP, Tally

SUMS = {
    "cross_entropy": torch.tensor([1.5, 2.0]),
    "penalty": torch.tensor([0.25, 0.5]),
    "entropy": torch.tensor([0.1, 0.2]),
    "steps": torch.tensor([[1, 2, 0], [0, 0, 3]]),
    "weights": torch.tensor([[1.0, 1.0, 1.0], [0.5, 1.5, 1.0]]),
    "own_losses": torch.tensor([[3.0, 2.0, 1.0], [3.0, 2.5, 2.0]]),
    "first_squared": torch.tensor([9.0, 9.5]),
    "steps_first": torch.tensor([2.0, 9.0]),
    "slots": torch.tensor([18, 18]),
    "slot_work": torch.tensor([54, 54]),
    "pair_work": torch.tensor([180, 180]),
}


def test_every_sum_comes_back_under_its_name():
    packed = Tally.pack(2, SUMS)
    assert packed.shape == (2, Tally.width(2)) == (2, 8 + 3 * 3)
    assert packed.dtype == torch.float64
    found = Tally.of(packed.sum(0))
    assert found._fields == tuple(SUMS)
    for name, sums in SUMS.items():
        assert getattr(found, name) == pytest.approx(sums.double().sum(0).tolist()), name
    assert found.steps == [1, 2, 3] and found.tokens == 6


@pytest.mark.parametrize("name", [name for name in SUMS if name != "cross_entropy"])
def test_what_is_not_given_is_zero(name):
    found = Tally.of(Tally.pack(2, {key: sums for key, sums in SUMS.items() if key != name}).sum(0))
    assert getattr(found, name) == ([0, 0, 0] if name in BY_STEP else 0)
    others = found._replace(**{name: getattr(Tally.of(Tally.pack(2, SUMS).sum(0)), name)})
    assert others == Tally.of(Tally.pack(2, SUMS).sum(0))
