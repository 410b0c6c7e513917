"""A model that has learnt its number of refinements is told of, and no other."""

import pytest

from megatron_ponder.model.tally import Tally
from megatron_ponder.training.refinement_dependence import TOLERANCE, dependence
from tests.models import small_config


def of_loss(nats: float) -> Tally:
    """A tally of ten tokens."""
    return Tally(10 * nats, 0, 0, [0, 0, 10], [0] * 3, [0] * 3, 0, 0, 0, 0, 0)


@pytest.mark.parametrize("sign", [1, -1])
def test_a_loss_that_the_fixed_point_does_not_have_is_complained_about(sign):
    config = small_config(ponder_training__jacobi_iterations=2)
    said = dependence(of_loss(1.109 + sign * 1.01 * TOLERANCE), of_loss(1.109), config)
    assert said.startswith("the model depends on the R of its training: 1.109 nats with R = 2, ")
    assert said.endswith("jacobi_iterations [2, 3], or with more")
    assert dependence(of_loss(1.109 + sign * 0.99 * TOLERANCE), of_loss(1.109), config) is None


def test_what_is_not_a_number_is_told_of():
    assert "nan when it decodes" in dependence(of_loss(float("nan")), of_loss(1.0), small_config())
