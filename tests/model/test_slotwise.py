"""Slots that are run once give what growth passes give, which compute them again and again."""

from functools import partial

import pytest
import torch
from torch import Tensor

from megatron_ponder.model.packed import packed_jacobi
from megatron_ponder.model.ponder import PonderLM, PonderOutput
from megatron_ponder.model.transformer import Recompute
from megatron_ponder.parallel.mesh import Mesh
from tests.generation.sequential import decode
from tests.grids import in_pairs
from tests.models import LEARNED, random_tokens, small_model
from tests.training.layouts import Layout, model_for

STEPS, EOD = 3, 7
TOKENS = random_tokens(3, 17)
FAMILIES = {
    "llama": {"model__num_kv_heads": 2},
    "gpt_neox": {"model__family": "gpt_neox"} | LEARNED,
    "numbers": {"ponder__latent_scale": 0.5},
    "token router": {"ponder__router_input": "token"},
}


def own_model(**overrides) -> PonderLM:
    values = {"ponder__latent_visibility": "own", "ponder__latent_steps": STEPS, "inference__threshold": 0.2}
    return small_model(**(values | overrides))


def loss_of(output: PonderOutput) -> Tensor:
    """Weighs every number differently."""
    weight = torch.linspace(-1, 1, output.output_BLH.numel(), dtype=output.output_BLH.dtype)
    loss = (output.output_BLH * weight.view_as(output.output_BLH)).sum()
    return loss if output.routing is None else loss + (output.routing.log_w.exp() * 0.3).sum()


def gradients(model: PonderLM, output: PonderOutput) -> dict[str, Tensor]:
    """Of every parameter but the head's, which the loss does not reach."""
    named = {name: parameter for name, parameter in model.named_parameters() if name != "head.weight"}
    return dict(zip(named, torch.autograd.grad(loss_of(output), list(named.values())), strict=True))


def assert_same_gradients(got: dict[str, Tensor], want: dict[str, Tensor], tolerance: float = 1e-11) -> None:
    for name, gradient in want.items():
        assert gradient.any(), name
        assert (got[name] - gradient).norm() < tolerance * gradient.norm(), name


@pytest.mark.parametrize(
    ("family", "mode", "kind", "documents"),
    in_pairs(list(FAMILIES), ["fixed", "adaptive"], ["soft", "hard"], [False, True]),
)
def test_once_equals_growth(family, mode, kind, documents):
    model = own_model(eod_id=EOD if documents else None, ponder__mode=mode, **FAMILIES[family])
    tokens, rule = TOKENS.masked_fill(TOKENS % 5 == 0, EOD), model.rule(kind)
    want, got = model.by_growth(tokens, 2, rule), model.jacobi(tokens, 2, rule)
    assert want.passes == got.passes == STEPS + 1
    assert want.slots_PB.tolist() == [[17 * slots] * 3 for slots in range(1, STEPS + 2)]
    assert got.slots_PB.tolist() == [[17] * 3] * (STEPS + 1)
    assert got.once and not want.once
    assert got.hidden_BLSH.shape == want.hidden_BLSH.shape
    assert (got.hidden_BLSH - want.hidden_BLSH).abs().max() < 1e-11
    assert (got.output_BLH - want.output_BLH).abs().max() < 1e-11
    if mode == "adaptive":
        assert torch.equal(got.routing.executed, want.routing.executed)
        assert len(got.routing.executed.unique()) > 2
        assert (got.routing.log_w - want.routing.log_w).abs().max() < 1e-11
    assert_same_gradients(gradients(model, got), gradients(model, want))


@pytest.mark.parametrize(
    ("family", "threshold", "documents"), in_pairs(list(FAMILIES), [1e-4, 0.2, 0.6], [False, True])
)
def test_packed_equals_masked(family, threshold, documents):
    model = own_model(eod_id=EOD if documents else None, **FAMILIES[family])
    tokens, rule = TOKENS.masked_fill(TOKENS % 5 == 0, EOD), model.rule("hard", threshold)
    want, got = model.jacobi(tokens, 1, rule), packed_jacobi(model, tokens, 1, rule)
    assert torch.equal(got.routing.executed, want.routing.executed)
    assert (got.output_BLH - want.output_BLH).abs().max() < 1e-11
    steps = torch.arange(STEPS + 1)
    runs_PB = (want.routing.executed >= steps[:, None, None]).sum(2)
    enough = runs_PB.sum(1) >= 2
    assert enough.sum() > 1 and torch.equal(got.slots_PB[enough], runs_PB[enough])
    ran = (steps <= want.routing.executed[..., None]).unsqueeze(-1)
    assert ((got.hidden_BLSH - want.hidden_BLSH) * ran).abs().max() < 1e-11
    assert_same_gradients(gradients(model, got), gradients(model, want))


@pytest.mark.parametrize("executed", [0, 1])
def test_steps_that_no_token_takes(executed):
    """Two tokens run them all the same, and nobody reads what they give."""
    model = own_model()
    with torch.no_grad():
        model.router.output.weight.mul_(1e-3)
        model.router.output.bias.copy_(-9.0 * (torch.arange(STEPS + 1) > executed))
    rule = model.rule("hard")
    want, got = model.jacobi(TOKENS, 0, rule), packed_jacobi(model, TOKENS, 0, rule)
    assert (want.routing.executed == executed).all()
    assert got.slots_PB.tolist() == [[17] * 3] * (executed + 1) + [[2, 0, 0]] * (STEPS - executed)
    assert (got.output_BLH - want.output_BLH).abs().max() < 1e-11
    (loss_of(got) + loss_of(want)).backward()
    assert all(parameter.grad.isfinite().all() for name, parameter in model.named_parameters() if name != "head.weight")


@pytest.mark.parametrize("gradient_passes", [1, 2, STEPS, STEPS + 1, 9])
def test_cut_gradients_are_those_of_growth_passes(gradient_passes):
    """Through fewer passes than there are only these have them."""
    model = own_model()
    rule, cut = model.rule("hard"), gradient_passes <= STEPS
    growth = model.by_growth(TOKENS, 0, rule, gradient_passes)
    want = gradients(model, growth)
    for evaluate in (model.jacobi, partial(packed_jacobi, model)):
        got = evaluate(TOKENS, 0, rule, gradient_passes)
        assert got.once != cut
        assert (got.output_BLH - growth.output_BLH).abs().max() < 1e-11
        assert_same_gradients(gradients(model, got), want)


@pytest.mark.parametrize("mode", ["fixed", "adaptive"])
@pytest.mark.parametrize("recompute", ["block", "attention"])
def test_recompute_changes_no_gradient(mode, recompute):
    model = own_model(ponder__mode=mode)
    evaluations = [model.jacobi] + [partial(packed_jacobi, model)] * (mode == "adaptive")
    for evaluate in evaluations:
        plain = gradients(model, evaluate(TOKENS, 0, model.rule("hard")))
        for passes in (None, 1, 3):
            model.recompute = Recompute(recompute, passes)
            again = gradients(model, evaluate(TOKENS, 0, model.rule("hard")))
            assert all(torch.equal(again[name], gradient) for name, gradient in plain.items())
        model.recompute = Recompute()


@torch.no_grad()
@pytest.mark.parametrize("mode", ["fixed", "adaptive"])
def test_it_is_the_sequential_model(mode):
    model = own_model(ponder__mode=mode, **FAMILIES["llama"])
    rule = model.rule("hard")
    got = model.jacobi(TOKENS, 0, rule)
    for row, tokens in enumerate(TOKENS):
        outputs, executed = decode(model, rule, tokens)
        assert (got.output_BLH[row] - outputs).abs().max() < 1e-11
        if mode == "adaptive":
            assert torch.equal(got.routing.executed[row], executed)


@torch.no_grad()
def test_without_latent_steps_there_is_one_pass():
    model = own_model()
    got = model.jacobi(TOKENS, 2, model.rule("none"))
    assert got.slots_PB.tolist() == [[17] * 3] and got.steps == 0 and not got.once


@torch.no_grad()
def test_a_blend_of_all_steps():
    model = own_model()
    rule = model.rule("all")
    assert (model.jacobi(TOKENS, 0, rule).output_BLH - model.by_growth(TOKENS, 0, rule).output_BLH).abs().max() < 1e-11


def on_ranks(mesh: Mesh, layout: Layout, cases: list[dict]) -> list[dict[str, Tensor]]:
    """Outputs of this rank's tokens and its gradients, of slots run once, of packed ones, and of growth passes."""
    found = []
    for case in cases:
        model = model_for(layout.config(case), mesh).double()
        share = layout.length // mesh.context.size
        tokens = random_tokens(3, layout.length)[:, share * mesh.context.rank :][:, :share].contiguous()
        rule = model.rule("hard")
        for evaluate in (model.by_growth, model.jacobi, partial(packed_jacobi, model)):
            output = evaluate(tokens, 0, rule)
            found.append(
                {"output": output.output_BLH.detach(), "executed": output.routing.executed} | gradients(model, output)
            )
    return found


@pytest.mark.parametrize(
    "layout",
    [
        Layout(tensor=2),
        Layout(tensor=2, sequence_parallel=True),
        Layout(context=2),
        pytest.param(Layout(context=2, tensor=2, sequence_parallel=True), marks=pytest.mark.slow),
    ],
    ids=["tp2", "tp2 sequence", "cp2", "cp2 tp2 sequence"],
)
def test_ranks_that_share_layers_or_tokens(layout):
    """Each has the same gradients; with sequence parallelism summands of them, of which packed slots have others."""
    own = {"ponder__latent_visibility": "own", "ponder__latent_steps": STEPS}
    cases = [own | {"model__num_kv_heads": 2}, own | {"data__reset_at_eod": True} | FAMILIES["gpt_neox"]]
    ranks = layout.run(on_ranks, cases)
    if layout.sequence_parallel:
        ranks = [
            [{name: sum(each[name] for each in of_all) for name in of_all[0]} for of_all in zip(*ranks, strict=True)]
        ]
    for results in ranks:
        for want, once, packed in zip(*[iter(results)] * 3, strict=True):
            assert len(want["executed"].unique()) > 1
            for got in (once, packed):
                for name, tensor in want.items():
                    assert (got[name] - tensor).double().norm() <= 1e-11 * max(1.0, tensor.double().norm()), name
