"""Pipelines run the slots that are kept and no other: they measure and count what one process does that packs."""

from functools import cache

import pytest
import torch

from megatron_ponder.model.tally import Tally
from megatron_ponder.parallel.mesh import Mesh
from megatron_ponder.training.deepspeed_engine import Engine
from megatron_ponder.training.objective import Objective
from tests.models import random_tokens
from tests.training.layouts import EOD, LENGTH, MODELS, Layout, model_for

CASE = MODELS["llama adaptive"] | {"ponder_training__prune_start": 0, "data__reset_at_eod": True}
# None of the latents at 1.0, which leaves nothing to hand over.
THRESHOLDS = (0.3, 1.0)
TOKENS = random_tokens(5, LENGTH + 1).masked_fill(random_tokens(5, LENGTH + 1) % 5 == 0, EOD)


def measured(mesh: Mesh, layout: Layout) -> list[tuple[Tally, Tally]]:
    """At every threshold the sums of a step, and those of an evaluation whose last micro-batch is smaller."""
    config, results = layout.config(CASE), []
    engine = Engine(Objective(model_for(config, mesh), packed=True), config, mesh)
    for threshold in THRESHOLDS:
        rule = engine.model.rule("hard", threshold)
        trained = engine.forward_backward(TOKENS[:4].split(2), 1, rule, 0.1, 1.0)
        engine.step(0.0)
        evaluated = engine.evaluate(TOKENS.split(2), 3, 2, rule, each_step=False)
        results.append((Tally.of(trained), Tally.of(evaluated)))
    return results


@cache
def alone(layers: int, packed: bool) -> list[tuple[Tally, Tally]]:
    """The same of one process."""
    objective = Objective(model_for(Layout().config(CASE | {"model__num_layers": layers})), packed=packed)
    with torch.no_grad():
        return [
            tuple(
                Tally.of(objective(tokens, refinements, objective.model.rule("hard", threshold))[1].sum(0))
                for tokens, refinements in ((TOKENS[:4], 1), (TOKENS, 2))
            )
            for threshold in THRESHOLDS
        ]


@pytest.mark.parametrize(
    "layout",
    [
        Layout(pipeline=2),
        pytest.param(Layout(tensor=2, pipeline=2, sequence_parallel=True), marks=pytest.mark.slow),
    ],
    ids=["pp2", "tp2 sequence pp2"],
)
def test_a_pipeline_runs_and_counts_the_slots_that_are_kept(layout):
    expected, masked = (alone(layout.pipeline + 1, packed) for packed in (True, False))
    for results in layout.run(measured):
        for got, packed, every in zip(results, expected, masked, strict=True):
            for tally, other, whole in zip(got, packed, every, strict=True):
                assert tally.slots == other.slots < whole.slots
                assert (tally.slot_work, tally.pair_work) == (other.slot_work, other.pair_work)
                assert tally.steps == whole.steps
                assert tally.cross_entropy == pytest.approx(whole.cross_entropy, rel=1e-5)
