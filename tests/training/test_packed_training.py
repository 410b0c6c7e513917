"""Training that runs only the slots that it keeps is the training that masks the others, step after step."""

import math
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from megatron_ponder.config import Config
from megatron_ponder.model.ponder import PonderLM
from megatron_ponder.model.tally import Tally
from megatron_ponder.model.transformer import Recompute
from megatron_ponder.training.objective import Objective
from megatron_ponder.training.schedules import refinements
from tests.models import random_tokens, small_config, small_model

STEPS, EOD, PENALTY = 3, 7, 0.3
DRAWN = {"ponder_training__jacobi_iterations": {0: 1, 1: 2, 3: 1}, "training__seed": 0}  # R 0, 3, 1
ROUNDING = {torch.float64: 1e-10, torch.float32: 1e-5}
# Both families, every K, τ and precision; the others are slow.
QUICK = [
    ("llama", 3, 1e-4, torch.float64),
    ("gpt_neox", 1, 0.1, torch.float64),
    ("llama", 2, 0.6, torch.float64),
    ("gpt_neox", 3, 0.3, torch.float32),
]
GRID = [
    pytest.param(*case, marks=() if case in QUICK else pytest.mark.slow)
    for family in ("llama", "gpt_neox")
    for steps in (1, 2, 3)
    for threshold in (1e-4, 0.1, 0.3, 0.6)
    for dtype in ROUNDING
    for case in [(family, steps, threshold, dtype)]
]


class Step(NamedTuple):
    """One step: its loss and sums, R, and the gradient of every parameter."""

    loss: float
    tally: Tally
    refinements: int
    gradients: dict[str, Tensor]


def deciding(config: Config, dtype: torch.dtype, eod_id: int | None, overrides: dict) -> PonderLM:
    """A model whose tokens differ in K̂, at whatever τ."""
    model = small_model(eod_id=eod_id, **overrides).to(dtype)
    with torch.no_grad():
        steps = torch.arange(config.ponder.latent_steps + 1)
        model.router.output.bias += 2 / len(steps) * math.log(config.inference.threshold) * steps
    return model


def tokens_of(step: int, eod_id: int | None) -> Tensor:
    """What a step trains on, int64 (3, 14), in documents if they have an end."""
    tokens = random_tokens(3, 14, seed=step)
    return tokens if eod_id is None else tokens.masked_fill(tokens % 5 == 0, eod_id)


def trained(model: PonderLM, config: Config, packed: bool) -> list[Step]:
    """Three steps that prune; Adam would make full steps of gradients that are rounding alone."""
    objective = Objective(model, config.ponder_training.gradient_passes, packed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-4)
    rule, steps = model.rule("hard"), []
    for step in range(STEPS):
        tokens, r = tokens_of(step, model.eod_id), refinements(step, config.training.seed, config.ponder_training)
        loss, sums = objective(tokens, r, rule, PENALTY)
        (loss / tokens[:, 1:].numel()).backward()
        gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
        optimizer.step()
        optimizer.zero_grad()
        steps.append(Step(loss.item(), Tally.of(sums.sum(0)), r, gradients))
    return steps


def assert_packed_equals_masked(dtype: torch.dtype = torch.float64, eod_id: int | None = None, **overrides) -> None:
    """Losses, every gradient and all weights in the end, where packed training has run fewer slots."""
    overrides, tolerance = DRAWN | overrides, ROUNDING[dtype]
    config = small_config(**overrides)
    models = [deciding(config, dtype, eod_id, overrides) for _ in range(2)]
    runs = [trained(model, config, packed) for model, packed in zip(models, (False, True), strict=True)]
    assert len({step.refinements for step in runs[0]}) == STEPS
    assert sum(count > 0 for count in runs[0][0].tally.steps) > 1
    for masked, packed in zip(*runs, strict=True):
        assert packed.loss == pytest.approx(masked.loss, rel=tolerance)
        assert packed.tally.steps == masked.tally.steps
        assert packed.tally.slots < masked.tally.slots
        assert_same_gradients(masked.gradients, packed.gradients, tolerance)
    for (name, weight), other in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        assert (weight - other).norm() <= tolerance * weight.norm(), name


def assert_same_gradients(expected: dict[str, Tensor], got: dict[str, Tensor], tolerance: float) -> None:
    """Each by its own norm; in fp32 by that of all, because some are small differences of large numbers."""
    whole = torch.stack([gradient.norm() for gradient in expected.values()]).norm()
    for name, gradient in expected.items():
        assert gradient.any(), name
        norm = whole if gradient.dtype == torch.float32 else gradient.norm()
        assert (got[name] - gradient).norm() <= tolerance * norm, name


@pytest.mark.parametrize(("family", "steps", "threshold", "dtype"), GRID)
def test_three_steps(family, steps, threshold, dtype):
    assert_packed_equals_masked(dtype, model__family=family, ponder__latent_steps=steps, inference__threshold=threshold)


@pytest.mark.parametrize(
    "overrides",
    [
        {"ponder_training__gradient_passes": 1},
        pytest.param({"ponder_training__gradient_passes": 2}, marks=pytest.mark.slow),
        pytest.param({"ponder__router_input": "token"}, marks=pytest.mark.slow),
        pytest.param({"model__num_kv_heads": 2, "model__tie_embeddings": "true"}, marks=pytest.mark.slow),
    ],
    ids=lambda overrides: "-".join(overrides),
)
def test_options(overrides):
    assert_packed_equals_masked(inference__threshold=0.3, **overrides)


def test_documents():
    assert_packed_equals_masked(eod_id=EOD, inference__threshold=0.3)


def test_recompute_and_own_losses():
    """Recompute changes no bit; what every step predicts by itself is masked, and changes nothing else."""
    overrides = {"inference__threshold": 0.3}
    model = deciding(small_config(**overrides), torch.float64, None, overrides)
    objective, rule, tokens = Objective(model, packed=True), model.rule("hard"), tokens_of(0, None)

    def gradients(each_step: bool = False) -> tuple[dict[str, Tensor], Tally]:
        loss, sums = objective(tokens, 1, rule, PENALTY, each_step)
        names, parameters = zip(*model.named_parameters(), strict=True)
        return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True)), Tally.of(sums.sum(0))

    plain, tally = gradients()
    for recompute in (Recompute("block"), Recompute("attention"), Recompute("block", 1)):
        model.recompute = recompute
        again, same = gradients()
        assert same == tally
        assert all(torch.equal(again[name], gradient) for name, gradient in plain.items())
    masked, measured = gradients(each_step=True)
    assert_same_gradients(masked, plain, 1e-10)
    assert measured.own_losses == Tally.of(Objective(model)(tokens, 1, rule, PENALTY, True)[1].sum(0)).own_losses
    assert min(measured.own_losses) > 0
    for name in ("cross_entropy", "penalty", "entropy", "weights", "steps"):
        assert getattr(tally, name) == pytest.approx(getattr(measured, name), rel=1e-10), name
