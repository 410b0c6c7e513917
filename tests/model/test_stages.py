"""Passes cut into stages, run one after another in one process, equal the model that was not cut."""

import pytest
import torch
from torch import Tensor

from megatron_ponder.model.modes.pondering import Sizes
from megatron_ponder.model.ponder import PonderLM, PonderOutput
from megatron_ponder.model.stages import PassShapes, PassStage
from megatron_ponder.model.transformer import ModelPart
from tests.models import LEARNED, random_tokens, small_model

BATCH, LENGTH, LAYERS, EOD = 2, 7, 4, 7
MODES = ("vanilla", "fixed", "adaptive", "pause", "sps", "loop", "ponderlm")
MODELS = [(family, mode) for family in ("llama", "gpt_neox") for mode in MODES]
# Blocks of each part.
CUTS = {2: (1, 3), 3: (1, 2, 1)}


def whole_model(family: str, mode: str, eod_id: int | None = None) -> PonderLM:
    options = {"model__family": family, "ponder__mode": mode, "model__num_layers": LAYERS}
    scaled = family == "gpt_neox" and mode in ("fixed", "adaptive", "loop")
    return small_model(router_scale=3.0, eod_id=eod_id, **options, **(LEARNED if scaled else {}))


def cut(model: PonderLM, counts: tuple[int, ...]) -> list[PonderLM]:
    """The same weights in parts."""
    parts = []
    for index, count in enumerate(counts):
        start = sum(counts[:index])
        part = ModelPart(range(start, start + count), first=index == 0, last=index == len(counts) - 1)
        parts.append(PonderLM(model.model_config, model.ponder_config, eod_id=model.eod_id, part=part).double())
        with torch.no_grad():
            for name, parameter in parts[-1].named_parameters():
                parameter.copy_(model.get_parameter(name))
    return parts


def loss_of(output: PonderOutput) -> Tensor:
    """Weighs every number differently."""
    weight = torch.linspace(-1, 1, output.output_BLH.numel()).view_as(output.output_BLH).double()
    loss = (output.output_BLH * weight).sum()
    return loss if output.routing is None else loss + (output.routing.log_w.exp() * 0.3).sum()


def chain(parts: list[PonderLM], tokens: Tensor, refinements: int, travelled: list[Tensor]) -> Tensor:
    """The loss, from all stages of all parts in turn."""
    rule = parts[0].rule("soft")
    shapes = PassShapes(parts[0].ponder_config, refinements, parts[0].sizes(BATCH, LENGTH))
    carried = tokens
    for index in range(len(shapes.plan)):
        for part in parts:
            carried = PassStage(part, index, shapes, rule, lambda output, _: loss_of(output))(carried, tokens)
            travelled.append(carried)
    assert [x.numel() for x in travelled[:-1]] == shapes.carried(len(parts), torch.float64)
    return carried


@pytest.mark.parametrize(("family", "mode"), MODELS)
@pytest.mark.parametrize("refinements", [0, 2])
@pytest.mark.parametrize("ranks", CUTS)
def test_a_chain_of_stages_equals_the_whole_model(family, mode, refinements, ranks):
    model, tokens = whole_model(family, mode), random_tokens(BATCH, LENGTH + 1)
    expected = loss_of(model.jacobi(tokens[:, :-1], refinements, model.rule("soft")))
    expected.backward()
    parts, travelled = cut(model, CUTS[ranks]), []
    got = chain(parts, tokens, refinements, travelled)
    got.backward()
    assert len(travelled) == ranks * len(model.passes.plan(refinements))
    assert got.item() == pytest.approx(expected.item(), rel=1e-12)
    gradients = {name: parameter.grad for part in parts for name, parameter in part.named_parameters()}
    assert gradients.keys() == dict(model.named_parameters()).keys()
    head = set() if mode == "ponderlm" else {"head.weight"}  # which this loss does not reach
    for name, parameter in model.named_parameters():
        if name in head:
            continue
        assert parameter.grad.norm() > 0, name
        error = (gradients[name] - parameter.grad).norm() / parameter.grad.norm()
        assert error < 1e-12, (name, error)


def test_stages_see_documents_as_the_whole_model_does():
    tokens = random_tokens(BATCH, LENGTH + 1)
    tokens[:, 2] = EOD
    losses = {}
    for eod_id in (None, EOD):
        model = whole_model("llama", "adaptive", eod_id)
        losses[eod_id] = loss_of(model.jacobi(tokens[:, :-1], 1, model.rule("soft"))).item()
        got = chain(cut(model, CUTS[2]), tokens, 1, []).item()
        assert got == pytest.approx(losses[eod_id], rel=1e-12)
    assert losses[None] != pytest.approx(losses[EOD], rel=1e-3)


@pytest.mark.parametrize("kind", ["soft", "hard"])
def test_the_last_stage_gives_the_whole_output(kind):
    """Output, routing and number of passes, under both rules."""
    model, tokens = whole_model("gpt_neox", "adaptive"), random_tokens(BATCH, LENGTH + 1)
    rule = model.rule(kind, threshold=0.3)
    expected = model.jacobi(tokens[:, :-1], 2, rule)
    assert len(set(expected.routing.executed.flatten().tolist())) > 1
    parts, outputs = cut(model, CUTS[3]), []
    shapes = PassShapes(model.ponder_config, 2, model.sizes(BATCH, LENGTH))

    def keep(output: PonderOutput, given: Tensor) -> Tensor:
        assert given is tokens
        outputs.append(output)
        return torch.zeros(1)

    carried = tokens
    for index in range(len(shapes.plan)):
        for part in parts:
            carried = PassStage(part, index, shapes, rule, keep)(carried, tokens)
    (got,) = outputs
    torch.testing.assert_close(got.output_BLH, expected.output_BLH, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(got.routing.log_w, expected.routing.log_w, rtol=1e-12, atol=1e-12)
    assert torch.equal(got.routing.executed, expected.routing.executed)
    assert got.passes == expected.passes == len(shapes.plan)


def test_shapes_of_what_travels():
    """K = 2, R = 0: 1, 2, 3 slots a token; without log weights into the first pass, or without a router."""
    adaptive, fixed, loop, ponderlm = (
        whole_model("llama", mode).ponder_config for mode in ("adaptive", "fixed", "loop", "ponderlm")
    )
    sizes = Sizes(batch=2, tokens=5, share=5, hidden_size=8, vocab_size=1000)
    shapes = PassShapes(adaptive, 0, sizes)
    assert shapes.plan == (1, 2, 3)
    assert [shapes.within(index) for index in range(3)] == [
        ((2, 5, 8), None),
        ((2, 10, 8), (2, 10)),
        ((2, 15, 8), (2, 15)),
    ]
    assert [shapes.after(index) for index in range(2)] == [
        ((2, 5, 1, 8), (2, 5, 2)),
        ((2, 5, 2, 8), (2, 5, 3)),
    ]
    numbers = [80, 80 + 20, 160 + 20, 160 + 30, 240 + 30]
    assert shapes.carried(2, torch.float32) == numbers
    assert shapes.carried(2, torch.bfloat16) == [80, 80 + 40, 160 + 40, 160 + 60, 240 + 60]
    plain = PassShapes(fixed, 0, sizes)
    assert plain.carried(2, torch.bfloat16) == [80, 80, 160, 160, 240]
    assert plain.carried(3, torch.float32) == [80, 80, 80, 160, 160, 160, 240, 240]
    assert PassShapes(loop, 0, sizes).carried(2, torch.bfloat16) == [80] * 5
    # the input of a pass goes along, and comes back with probabilities and ids of the 100 likeliest of each token
    shapes = PassShapes(ponderlm, 0, sizes._replace(share=3))
    assert [shapes.within(0), shapes.after(0)] == [((2, 2, 3, 8), None), ((2, 3, 8), (2, 5, 2, 100))]
    assert shapes.carried(2, torch.bfloat16) == [96, 48 + 4000, 96, 48 + 4000, 96]
