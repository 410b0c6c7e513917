"""Pruned passes that run only what they keep equal those that mask it."""

import pytest
import torch
from torch import Tensor, nn

from megatron_ponder.kernels.attention import DEAD
from megatron_ponder.model.packed import packed_jacobi
from megatron_ponder.model.ponder import PonderLM
from tests.grids import in_pairs
from tests.models import LEARNED, random_tokens, small_model

TOKENS = random_tokens(3, 17)


@pytest.mark.parametrize(
    ("family", "threshold", "depth", "documents"),
    in_pairs(["llama", "gpt_neox"], [1e-4, 0.1, 0.3, 0.6], [(1, 2), (2, 0), (3, 2)], [False, True]),
)
def test_packed_equals_masked(family, threshold, depth, documents):
    steps, refinements = depth
    scale = LEARNED if family == "gpt_neox" else {}
    model = small_model(model__family=family, ponder__latent_steps=steps, inference__threshold=threshold, **scale)
    model.eod_id = 7 if documents else None
    tokens = TOKENS.masked_fill(TOKENS % 5 == 0, 7)
    rule = model.rule("hard", threshold)
    results = [model.jacobi(tokens, refinements, rule), packed_jacobi(model, tokens, refinements, rule)]
    found = []
    for result in results:
        weight = torch.linspace(-1, 1, result.output_BLH.numel(), dtype=torch.float64).view_as(result.output_BLH)
        loss = (result.output_BLH * weight).sum() + result.routing.log_w.exp().sum()
        found.append((loss, torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)))
    assert torch.equal(results[0].routing.executed, results[1].routing.executed)
    (loss, gradients), (packed, others) = found
    assert packed.item() == pytest.approx(loss.item(), rel=1e-12)
    for (name, _), gradient, other in zip(model.named_parameters(), gradients, others, strict=True):
        if gradient is not None:
            assert (gradient - other).norm() <= 1e-10 * gradient.norm(), name


class Scripted(nn.Module):
    """A router that is told, pass by pass, how many latent steps every token of a sequence is to take.

    Attributes:
        router: whose logits vary what it is told, within τ.
        wanted_PL: K̂ of every token in every pass.
        asked: in how many passes it was asked.
    """

    def __init__(self, router: nn.Module, wanted_PL: Tensor) -> None:
        super().__init__()
        self.router, self.wanted_PL, self.asked = router, wanted_PL, 0

    def forward(self, h_1LH: Tensor) -> Tensor:
        logits = 0.1 * self.router(h_1LH)
        beyond = torch.arange(logits.shape[-1]) > self.wanted_PL[self.asked].unsqueeze(-1)
        self.asked += 1
        return logits - 9.0 * beyond


def slots_and_gradients(model: PonderLM, wanted_PL: Tensor, evaluate) -> tuple[list[int], list[Tensor]]:
    """Slots of every pass that are there as keys, and the gradients of a sum over the output.

    Args:
        model: whose router is told.
        wanted_PL: as in `Scripted`.
        evaluate: tokens, R and a rule to a `PonderOutput`.
    """
    router, slots = model.router, []
    hook = model.transformer.register_forward_pre_hook(
        lambda _, inputs: slots.append(
            inputs[0].shape[1] if inputs[1].log_w_BT is None else int((inputs[1].log_w_BT != DEAD).sum())
        )
    )
    model.router = Scripted(router, wanted_PL)
    output = evaluate(random_tokens(1, wanted_PL.shape[1]), len(wanted_PL) - 4, model.rule("hard", 0.01)).output_BLH
    model.router = router
    hook.remove()
    weight = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)
    return slots, list(torch.autograd.grad((output * weight).sum(), list(model.transformer.parameters())))


def test_a_token_gains_one_slot_a_pass_and_loses_them_at_once():
    """K̂ of the first token jumps from 0 to 3, that of the second falls to 0 for one pass."""
    model = small_model(ponder__latent_steps=3)
    jump, fall = [0, 0, 0, 0, 3, 3, 3, 3, 3], [3, 3, 3, 3, 0, 3, 3, 3, 3]
    ran = ([0, 0, 0, 0, 0, 1, 2, 3, 3], [0, 1, 2, 3, 3, 0, 1, 2, 3])
    wanted_PL = torch.tensor([jump, fall, [1] * 9]).T
    masked = slots_and_gradients(model, wanted_PL, model.jacobi)
    packed = slots_and_gradients(model, wanted_PL, lambda *arguments: packed_jacobi(model, *arguments))
    of_third = [1, *[2] * 8]
    assert masked[0] == packed[0] == [2 + a + b + c for a, b, c in zip(*ran, of_third, strict=True)]
    for gradient, other in zip(masked[1], packed[1], strict=True):
        assert gradient.any()
        assert (gradient - other).norm() <= 1e-10 * gradient.norm()
