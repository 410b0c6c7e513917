"""What a run says about a router that has collapsed, or whose small weights are used."""

import re

import pytest

from megatron_ponder.model.tally import Tally
from megatron_ponder.training.router_health import FORMING, router_complaint
from tests.models import small_config


def complaint(steps: list[int], step: int = FORMING, cost: float = 0.0, **overrides) -> str | None:
    config = small_config(**overrides)
    return router_complaint(Tally(0.0, 0.0, 0.0, steps, [], [], 0.0, 0.0, 0.0, 0.0, 0.0), cost, step, config)


@pytest.mark.parametrize(
    ("steps", "words"),
    [
        ([1000, 0, 0], r"99\.9% of tokens or more take no latent step: the router has collapsed; lower"),
        ([1, 0, 999], r"99\.9% of tokens or more take all 2 latent steps: nothing is pruned; raise .*\(0\.02\)"),
        ([0, 1000, 0], r"99\.9% of tokens or more take 1 latent steps: the router does not tell tokens apart"),
    ],
)
def test_one_number_of_steps_for_all(steps, words):
    assert re.search(words, complaint(steps, inference__threshold=0.02))


@pytest.mark.parametrize("steps", [[990, 10, 0], [0, 2, 998], [400, 300, 300]])
def test_several_numbers_of_steps_are_right(steps):
    assert complaint(steps) is None


def test_a_router_has_time_to_form():
    assert complaint([1000, 0, 0], FORMING - 1) is None
    assert complaint([1000, 0, 0], 499, ponder_training__penalty_end=500) is None
    assert complaint([1000, 0, 0], 500, ponder_training__penalty_end=500) is not None


def test_what_pruning_costs():
    assert complaint([400, 300, 300], cost=0.01) is None
    words = r"weight is below inference\.threshold \(0\.02\) the loss is 0\.720 nats higher: .* set .*prune_start"
    assert re.search(words, complaint([400, 300, 300], cost=0.72, inference__threshold=0.02))
