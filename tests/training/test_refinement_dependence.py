"""A model that has learnt its number of refinements is told of, and no other."""

from unittest import mock

import pytest

from megatron_ponder.base.watchdog import Watchdog
from megatron_ponder.model.router import Rule
from megatron_ponder.model.tally import Tally
from megatron_ponder.training import validation_sets
from megatron_ponder.training.refinement_dependence import TOLERANCE, dependence
from megatron_ponder.training.validation_sets import ValidationSets
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


class Measured:
    """A validation whose numbers are given: a nat by the refinements of training, and so many by `exact`."""

    exact: float | None

    def __init__(self, *_) -> None:
        pass

    def run(self, rule: Rule) -> tuple[Tally, Tally]:
        return of_loss(1.0), of_loss(1.0)

    def run_exact(self, rule: Rule) -> tuple[Tally, Tally] | None:
        assert rule.kind == "hard"
        return None if self.exact is None else (of_loss(self.exact), of_loss(1.0))


def test_the_end_of_a_run_says_when_its_model_depends_on_its_refinements():
    def sets(exact: float | None, **overrides) -> ValidationSets:
        config = small_config(training__steps=4, ponder_training__jacobi_iterations=2, **overrides)
        measured = type("Given", (Measured,), {"exact": exact})
        with mock.patch.object(validation_sets, "Validation", measured):
            return ValidationSets(config, None, {"valid": None}, None, None, Watchdog(0))

    found = sets(2.5).run(4)
    assert (found.fields["validation_exact_loss"], found.fields["validation_exact_gap"]) == (2.5, 1.5)
    assert found.said[1] == "step 4  validation by exact 2.5000, with R of training 1.0000"
    assert found.said[2].startswith(
        "step 4  warning: the model depends on the R of its training: 1.000 nats with R = 2"
    )
    assert len(sets(1.0).run(4).said) == 2
    assert sets(None).run(4) is None
    for quiet in (sets(2.5).run(3), sets(2.5, training__exact_samples=0).run(4), sets(2.5, ponder__mode="loop").run(4)):
        assert len(quiet.said) == 1
        assert "validation_exact_loss" not in quiet.fields
