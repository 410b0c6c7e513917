"""Packed passes cut into stages, run one after another in one process, equal the model that masks what is pruned."""

import pytest
import torch

from megatron_ponder.model.packed_stages import PackedShapes, PackedStage
from tests.model.test_stages import BATCH, CUTS, EOD, LENGTH, cut, loss_of, whole_model
from tests.models import random_tokens


@pytest.mark.parametrize(
    ("family", "ranks", "threshold", "documents"),
    [
        ("llama", 2, 1e-4, False),  # all latents are run
        ("gpt_neox", 3, 0.3, False),
        ("llama", 3, 0.3, True),
        ("gpt_neox", 2, 1.0, True),  # none
    ],
)
def test_a_chain_of_packed_stages_equals_the_masked_model(family, ranks, threshold, documents):
    model, tokens = whole_model(family, "adaptive", EOD if documents else None), random_tokens(BATCH, LENGTH + 1)
    tokens[:, 2] = EOD
    rule, outputs = model.rule("hard", threshold), []
    expected = model.jacobi(tokens[:, :-1], 2, rule)
    loss_of(expected).backward()
    parts = cut(model, CUTS[ranks])
    shapes = PackedShapes(model.ponder_config, 2, model.sizes(BATCH, LENGTH), model.axis)
    carried, travelled = tokens, []
    for index in range(len(shapes.plan)):
        for part in parts:
            stage = PackedStage(part, index, shapes, rule, lambda output, _: outputs.append(output) or loss_of(output))
            carried = stage(carried, tokens)
            travelled.append(carried)
    carried.backward()
    assert [x.numel() for x in travelled[:-1]] == shapes.carried(ranks, torch.float64)
    assert carried.item() == pytest.approx(loss_of(expected).item(), rel=1e-12)
    (got,) = outputs
    assert torch.equal(got.routing.executed, expected.routing.executed)
    assert_slots_follow_the_rule(got.slots_PB, expected.slots_PB, threshold)
    gradients = {name: parameter.grad for part in parts for name, parameter in part.named_parameters()}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            assert (gradients[name] - parameter.grad).norm() <= 1e-10 * parameter.grad.norm(), name


def assert_slots_follow_the_rule(got: torch.Tensor, masked: torch.Tensor, threshold: float) -> None:
    """All slots of the plan, some of them, or those of the tokens alone."""
    if threshold == 1.0:
        assert (got == LENGTH).all()
    elif threshold == 1e-4:
        assert torch.equal(got, masked)
    else:
        assert (got[1:] > LENGTH).all() and (got[2:] < masked[2:]).all()
