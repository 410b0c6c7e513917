"""Every layout of ranks computes the training run of one process: losses, every gradient, norms, updated weights."""

from dataclasses import replace
from functools import cache

import pytest
import torch

from megatron_ponder.model.passes import pass_slots
from megatron_ponder.model.stages import PassStage
from megatron_ponder.parallel.mesh import Mesh
from megatron_ponder.training.deepspeed_engine import Engine
from megatron_ponder.training.objective import Objective
from megatron_ponder.training.schedules import refinements
from tests.models import LEARNED
from tests.training.layouts import (
    MODELS,
    MUON,
    STEPS,
    Layout,
    alone,
    assert_equal_to_one_process,
    assert_near_one_process,
    assert_same_tally,
    batch_of,
    model_for,
    saved_slots,
    train,
    train_all,
)

LAYOUTS = {
    "tp2": Layout(tensor=2),
    "tp2 sequence": Layout(tensor=2, sequence_parallel=True),
    "pp2": Layout(pipeline=2),
    "pp4": Layout(pipeline=4),
    "tp2 pp2": Layout(tensor=2, pipeline=2),
    "tp2 dp2 zero1": Layout(tensor=2, data=2, zero_stage=1),
    "tp2 dp2 zero3": Layout(tensor=2, data=2, zero_stage=3),
    "pp2 dp2 zero1": Layout(pipeline=2, data=2, zero_stage=1),
    "tp2 sequence pp2": Layout(tensor=2, pipeline=2, sequence_parallel=True),
    "tp2 sequence zero0": Layout(tensor=2, sequence_parallel=True, zero_stage=0),
    "tp2 sequence dp2 zero2": Layout(tensor=2, data=2, sequence_parallel=True, zero_stage=2),
    "tp2 sequence dp2 zero3": Layout(tensor=2, data=2, sequence_parallel=True, zero_stage=3),
    "tp2 pp2 dp2": Layout(tensor=2, pipeline=2, data=2, zero_stage=1),
    "dp2 zero0": Layout(data=2, zero_stage=0),
    "cp2": Layout(context=2),
    "cp4": Layout(context=4),
    "cp2 tp2": Layout(context=2, tensor=2),
    "cp2 tp2 sequence": Layout(context=2, tensor=2, sequence_parallel=True),
    "cp2 pp2": Layout(context=2, pipeline=2),
    "cp2 dp2 zero0": Layout(context=2, data=2, zero_stage=0),
    "cp2 dp2 zero1": Layout(context=2, data=2, zero_stage=1),
    "cp2 dp2 zero3": Layout(context=2, data=2, zero_stage=3),
}
# Every mode and both families in either way of splitting a model.
QUICK = {
    "tp2 sequence": (
        *(model for model in MODELS if model not in ("llama fixed", "gpt_neox vanilla", "tied")),
        "pruned llama",
        "growing batch",
        "penalty on the batch",
    ),
    "pp2": (
        "gpt_neox vanilla",
        "gpt_neox fixed",
        "llama adaptive",
        "llama pause",
        "llama sps",
        "gpt_neox loop",
        "llama ponderlm",
        "tied",
        "pruned llama",
        "slow router",
    ),
    "tp2 pp2": ("llama adaptive", "muon"),
    "pp2 dp2 zero1": ("gpt_neox adaptive", "tied", "growing batch", "penalty on the batch, pruned"),
    "cp2": (
        "gpt_neox adaptive",
        "mixed features",
        "pruned gpt_neox, documents",
        "pruned own, documents",
        "penalty on the batch",
    ),
}
LLAMA, NEOX = MODELS["llama adaptive"], MODELS["gpt_neox adaptive"]
# Of every layout.
PRUNED = {
    "pruned llama": LLAMA | LEARNED | {"ponder_training__prune_start": 0},
    "pruned gpt_neox, documents": NEOX
    | {"ponder_training__prune_start": 0, "ponder__latent_steps": 3, "data__reset_at_eod": True},
    "pruned own, documents": MODELS["gpt_neox own"] | {"ponder_training__prune_start": 0, "data__reset_at_eod": True},
}
OF_MUON = {
    "muon": LLAMA | MUON,
    "muon, mixed features": MODELS["mixed features"] | MUON | {"optimizer__muon_scaling": "original"},
}
SLOW_ROUTER = {"slow router": LLAMA | {"optimizer__router_learning_rate_factor": 0.25}}
SLOW_ROUTER |= {"muon, slow router": SLOW_ROUTER["slow router"] | MUON}
ON_BATCH = {
    "penalty on the batch": LLAMA
    | {
        "ponder_training__penalty": "batch",
        "ponder_training__penalty_prior": "[0.7, 0.2, 0.1]",
        "ponder_training__penalty_weight": 3.0,
    }
}
ON_BATCH["penalty on the batch, pruned"] = ON_BATCH["penalty on the batch"] | {"ponder_training__prune_start": 0}
CASES = MODELS | PRUNED | OF_MUON | SLOW_ROUTER | ON_BATCH


def growing(layout: Layout) -> dict[str, dict]:
    """A case whose first step has half of the micro-batches of the others."""
    half = layout.global_batch_size // 2
    return {"growing batch": LLAMA | {"training__batch_size_ramp": f"{half} {half} {half}"}}


RECOMPUTE = {
    "recompute block": LLAMA | {"training__recompute": "block"},
    "recompute attention": NEOX | {"training__recompute": "attention"},
    "recompute one pass": LLAMA | {"training__recompute": "block", "training__recompute_passes": 1},
}
COMPILED = {
    "compiled": LLAMA | {"training__compile": True},
    "compiled, learned factor": LLAMA | LEARNED | {"training__compile": True},
    "compiled, recompute": NEOX | {"training__compile": True, "training__recompute": "block"},
    "compiled, pruned": LLAMA | {"training__compile": True, "ponder_training__prune_start": 0},
    "compiled, own": MODELS["gpt_neox own"] | {"training__compile": True, "training__recompute": "block"},
}
VARIANTS = {
    "tp2 dp2 zero1": COMPILED | {"compiled, zero2": LLAMA | {"training__compile": True, "parallel__zero_stage": 2}},
    "pp2": RECOMPUTE
    | COMPILED
    | {
        "zero bubble adaptive": LLAMA | {"parallel__pipeline_schedule": "zero_bubble"},
        "zero bubble fixed": MODELS["gpt_neox fixed"] | {"parallel__pipeline_schedule": "zero_bubble"},
        "unequal parts": LLAMA | {"model__num_layers": 4, "parallel__pipeline_layers": [1, 3]},
        "unequal parts the other way": NEOX | {"model__num_layers": 4, "parallel__pipeline_layers": [3, 1]},
        "documents": LLAMA | {"data__reset_at_eod": True},
        "two-layer router": NEOX | {"ponder__router_hidden_size": 8},
        "tied, zero bubble": MODELS["tied"] | {"parallel__pipeline_schedule": "zero_bubble"},
        "tied, zero0": MODELS["tied"] | {"parallel__zero_stage": 0},
        "tied, compiled": MODELS["tied"] | {"training__compile": True},
        "tied ponderlm": MODELS["tied"] | {"ponder__mode": "ponderlm", "model__vocab_size": 301},
        "pruned, recompute block": PRUNED["pruned llama"] | {"training__recompute": "block"},
        "pruned, zero bubble": PRUNED["pruned gpt_neox, documents"] | {"parallel__pipeline_schedule": "zero_bubble"},
        "before latent steps": MODELS["llama fixed"]
        | {"model__family": "gpt_neox"}
        | {"ponder_training__latent_start": STEPS},
        **{f"{count} micro-batches": LLAMA | {"training__global_batch_size": 2 * count} for count in (1, 2, 3, 6)},
    },
    "tp2 sequence": RECOMPUTE
    | COMPILED
    | {
        "documents": LLAMA | {"data__reset_at_eod": True},
        "two-layer router": NEOX | {"ponder__router_hidden_size": 8},
        "pruned, recompute block": PRUNED["pruned llama"] | {"training__recompute": "block"},
        "pruned, recompute attention": PRUNED["pruned gpt_neox, documents"] | {"training__recompute": "attention"},
        "pruned own, compiled": PRUNED["pruned own, documents"] | {"training__compile": True},
        "pruned, two-layer router": PRUNED["pruned llama"] | {"ponder__router_hidden_size": 8},
        "before latent steps": MODELS["llama fixed"] | {"ponder_training__latent_start": STEPS},
        "padded vocabulary": LLAMA | {"parallel__vocab_multiple": 8},
    },
    "cp2": RECOMPUTE
    | {name: case for name, case in COMPILED.items() if name != "compiled, pruned"}
    | {
        "documents": LLAMA | {"data__reset_at_eod": True},
        "pruned, recompute block": PRUNED["pruned llama"] | {"training__recompute": "block"},
        "pruned, recompute attention": PRUNED["pruned gpt_neox, documents"] | {"training__recompute": "attention"},
        "before latent steps": MODELS["llama fixed"] | {"ponder_training__latent_start": STEPS},
        "token router": LLAMA | {"ponder__router_input": "token"},
    },
    "pp4": {
        "tied, zero bubble": MODELS["tied"] | {"parallel__pipeline_schedule": "zero_bubble"},
        "learned factor, zero bubble": NEOX | {"parallel__pipeline_schedule": "zero_bubble"},
    },
    "cp4": {"one head of keys": LLAMA | {"model__num_kv_heads": 1}},
    "cp2 pp2": {
        "documents": LLAMA | {"data__reset_at_eod": True},
        "pruned, zero bubble": PRUNED["pruned gpt_neox, documents"] | {"parallel__pipeline_schedule": "zero_bubble"},
        "pruned, recompute block": PRUNED["pruned llama"] | {"training__recompute": "block"},
    },
    "tp2 sequence pp2": {
        "pruned, zero bubble": PRUNED["pruned llama"] | {"parallel__pipeline_schedule": "zero_bubble"},
        "pruned, recompute block": PRUNED["pruned gpt_neox, documents"] | {"training__recompute": "block"},
        "compiled, pruned": COMPILED["compiled, pruned"],
    },
}
LOW_PRECISION = {
    name: case | {"training__precision": "bf16"}
    for name, case in (MODELS | COMPILED).items()
    if "adaptive" in name or name in ("compiled", "compiled, learned factor", "tied")
}
CASES_OF = {name: CASES | growing(layout) for name, layout in LAYOUTS.items()}


def slow_cases(name: str) -> dict[str, dict]:
    """All that a layout allows and is not among its quick cases."""
    refused = [case for case in CASES if "muon" in case] if LAYOUTS[name].zero_stage == 3 else []
    return {case: given for case, given in CASES_OF[name].items() if case not in (*QUICK.get(name, ()), *refused)}


# What is run in one start of a layout's ranks, because importing DeepSpeed takes seconds: the quick cases of a layout,
# the others, the variants.
GROUPS = {
    **{(name, "quick"): {case: CASES_OF[name][case] for case in cases} for name, cases in QUICK.items()},
    **{(name, "slow"): slow_cases(name) for name in LAYOUTS},
    **{(name, "variants"): cases for name, cases in VARIANTS.items()},
}


@cache
def trained(group: tuple[str, str]) -> list[dict] | Exception:
    """What every rank returned for all cases of a group; an error is kept too, so that it is met only once."""
    try:
        return LAYOUTS[group[0]].run(train_all, GROUPS[group])
    except (AssertionError, TimeoutError) as error:
        return error


@pytest.mark.parametrize(
    ("group", "case"),
    [
        pytest.param(group, case, id=f"{group[0]}-{case}", marks=() if group[1] == "quick" else pytest.mark.slow)
        for group, cases in GROUPS.items()
        for case in cases
    ],
)
def test_a_layout_equals_one_process(group, case):
    ranks = trained(group)
    if isinstance(ranks, Exception):
        raise ranks
    overrides, runs = GROUPS[group][case], [runs[case] for runs in ranks]
    assert_equal_to_one_process(LAYOUTS[group[0]], overrides, runs)
    prunes = "ponder_training__prune_start" in overrides
    assert {saved_slots(LAYOUTS[group[0]], overrides, run) for run in runs} == {prunes}


@pytest.mark.slow
@pytest.mark.parametrize(
    "layout",
    [
        LAYOUTS["pp2"],
        replace(LAYOUTS["tp2 dp2 zero1"], zero_stage=2),
        LAYOUTS["tp2 sequence pp2"],
        LAYOUTS["cp2 dp2 zero1"],
    ],
    ids=["pp2", "tp2 dp2 zero2", "tp2 sequence pp2", "cp2 dp2 zero1"],
)
def test_bf16_stays_near_fp32(layout):
    ranks = layout.run(train_all, LOW_PRECISION)
    for model, case in LOW_PRECISION.items():
        assert_near_one_process(layout, case, [runs[model] for runs in ranks])


# Ragged micro-batches and unequal shares of the data-parallel ranks; a rank without any.
EVALUATIONS = ((9, "soft", True), (9, "hard", True), (9, "hard", False), (1, "soft", True))


def train_and_evaluate(mesh: Mesh, layout: Layout, cases: dict[str, dict]) -> dict[str, tuple]:
    """Training with evaluations between the steps, and without."""
    return {name: (train(mesh, layout, case, EVALUATIONS), train(mesh, layout, case)) for name, case in cases.items()}


@pytest.mark.slow
@pytest.mark.parametrize(
    "layout",
    [
        LAYOUTS["pp2"],
        LAYOUTS["tp2 sequence"],
        LAYOUTS["pp2 dp2 zero1"],
        Layout(data=2, zero_stage=3),
        LAYOUTS["cp2 pp2"],
        LAYOUTS["cp2 dp2 zero3"],
    ],
    ids=["pp2", "tp2 sequence", "pp2 dp2 zero1", "dp2 zero3", "cp2 pp2", "cp2 dp2 zero3"],
)
def test_evaluation_equals_one_process_and_disturbs_no_training(layout):
    cases = {model: MODELS[model] for model in ("llama adaptive", "gpt_neox fixed")}
    for results in layout.run(train_and_evaluate, cases):
        for model, (evaluated, undisturbed) in results.items():
            want = alone(layout, cases[model], EVALUATIONS).evaluations
            for step, (got, expected) in enumerate(zip(evaluated.evaluations, want, strict=True)):
                for item, tally in expected.items():
                    assert tally.tokens == item[0] * layout.length
                    assert_same_tally(got[item], tally, 1e-5 if step else 1e-6)
            for weight, other in zip(evaluated.after.values(), undisturbed.after.values(), strict=True):
                assert torch.equal(weight, other)


def train_with_drawn_refinements(mesh: Mesh, layout: Layout, case: dict) -> list[tuple[int, int]]:
    """R of every step and the stages that this rank ran in it."""
    config = layout.config(case)
    engine = Engine(Objective(model_for(config, mesh)), config, mesh)
    executed, forward = [], PassStage.forward

    def counted(stage: PassStage, *args, **kwargs):
        executed.append(stage)
        return forward(stage, *args, **kwargs)

    PassStage.forward = counted
    seen = []
    for step in range(6):
        executed.clear()
        drawn = refinements(step, config.training.seed, config.ponder_training)
        engine.forward_backward(batch_of(config, step).split(2), drawn, engine.rule("soft"), 0.0, 1.0)
        engine.step(1e-3)
        seen.append((drawn, len(executed)))
    return seen


@pytest.mark.slow
def test_every_rank_draws_the_same_refinements_and_runs_as_many_passes():
    case = LLAMA | {"ponder_training__jacobi_iterations": [0, 1, 3]}
    first, *others = LAYOUTS["pp2"].run(train_with_drawn_refinements, case)
    assert others == [first]
    assert len({drawn for drawn, _ in first}) == 3
    for drawn, stages in first:
        assert stages == 4 * len(pass_slots(2, drawn))
