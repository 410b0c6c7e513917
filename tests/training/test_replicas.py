"""What ranks hold alike: rounding is mended where it may be, and what faulty memory makes ends the run in one line."""

import math

import pytest
import torch

from megatron_ponder.base.errors import UserError
from megatron_ponder.parallel.collectives import together
from megatron_ponder.parallel.mesh import Mesh
from megatron_ponder.runs.metrics import read_metrics
from megatron_ponder.training import loop, replicas
from megatron_ponder.training.deepspeed_engine import Engine
from megatron_ponder.training.objective import Objective
from megatron_ponder.training.replicas import COMPARED, allowed_drift, differing_replicas, mend_replicas
from megatron_ponder.training.schedules import training_rule
from megatron_ponder.training.state import state_of
from tests.distributed import run_distributed
from tests.finished_runs import tiny_arguments
from tests.models import small_config
from tests.training.layouts import LENGTH, MODELS, MUON, RATE, Layout, batch_of, model_for
from tests.training.test_faults import Attempt, attempt

# Factors on a number of the last rank alone.
SMALL, LARGE = 1 + 1e-5, 1e6
ALLOWED = 1e-2
CASES = {
    f"zero{stage} {precision}": MODELS["llama adaptive"]
    | {"parallel__zero_stage": stage, "training__precision": precision}
    for stage, precision in ((0, "fp32"), (1, "fp32"), (2, "bf16"), (3, "fp32"))
}


def spoil(engine: Engine, factor: float) -> None:
    """Change a number of a parameter that tensor ranks, and data ranks, hold alike, on the last rank alone."""
    if torch.distributed.get_rank() == torch.distributed.get_world_size() - 1:
        held = engine.held(engine.model.transformer.norm.weight)
        factor = factor if held.dtype == torch.float32 or factor == LARGE else 1 + 2**-7
        held[len(held) // 2 :].mul_(factor)


def take_step(engine: Engine, config, mesh: Mesh, step: int) -> None:
    tokens = torch.chunk(batch_of(config, step), mesh.data.size)[mesh.data.rank]
    scale = 1 / (config.training.global_batch_size * LENGTH)
    engine.forward_backward(tokens.split(2), 1, training_rule(step, config), 0.05, scale)
    engine.step(RATE)


def drift(mesh: Mesh, layout: Layout, cases: dict[str, dict]) -> dict[str, dict]:
    """What is found when ranks are alike, after a little and after a large difference, and after a step on each."""
    name, seen = "tensor" if mesh.tensor.size > 1 else "copies", {}
    for case, overrides in cases.items():
        config = layout.config(overrides)
        engine, found = Engine(Objective(model_for(config, mesh)), config, mesh), {}
        take_step(engine, config, mesh, 0)
        found["alike"] = mend_replicas(engine, 1, 0.0, "go back")
        spoil(engine, SMALL)
        for which, allowed in (("exact", 0.0), ("small", ALLOWED), ("mended", 0.0)):
            try:
                found[which] = together(lambda allowed=allowed: mend_replicas(engine, 1, allowed, "go back"))  # noqa: B023
            except UserError as error:
                found[which] = str(error)
        take_step(engine, config, mesh, 1)
        found["differing"] = differing_replicas(engine, name)
        found["state"] = {(item.kind, item.name): item.tensor.clone() for item in state_of(engine)}
        spoil(engine, LARGE)
        with pytest.raises(UserError) as caught:
            together(lambda: mend_replicas(engine, 2, ALLOWED, "go back"))  # noqa: B023
        found["large"] = str(caught.value)
        seen[case] = found
    return seen


def check(ranks: list[dict], cases: dict, name: str) -> None:
    for case in cases:
        first, second = (seen[case] for seen in ranks)
        for found in (first, second):
            assert found["alike"] is None
            assert f"transformer.norm.weight differs between {COMPARED[name]} by " in found["exact"]
            assert found["small"].parameters == 1
            assert 1e-6 < found["small"].size < ALLOWED
            assert found["mended"] is None
            assert found["differing"] == []
            assert "differs between " in found["large"] and found["large"].endswith("; go back, on other nodes")
        for key, tensor in first["state"].items():
            assert torch.equal(tensor, second["state"][key]), (case, key)


def test_drift_between_data_ranks():
    cases = {name: case for name, case in CASES.items() if not name.startswith("zero3")}  # where nothing is alike
    check(Layout(data=2).run(drift, cases), cases, "copies")


def test_drift_between_tensor_ranks():
    check(Layout(tensor=2).run(drift, CASES), CASES, "tensor")


@pytest.mark.slow
@pytest.mark.parametrize(("name", "layout"), [("copies", Layout(data=2)), ("tensor", Layout(tensor=2))])
def test_drift_of_what_muon_and_adamw_move(name, layout):
    cases = {case: CASES[case] | MUON for case in ("zero0 fp32", "zero2 bf16")}
    check(layout.run(drift, cases), cases, name)


@pytest.mark.slow
def test_drift_between_tensor_ranks_of_several_data_and_pipeline_ranks():
    for layout in (Layout(tensor=2, data=2), Layout(tensor=2, pipeline=2)):
        cases = {name: case for name, case in CASES.items() if name == "zero1 fp32"}
        first, *_, last = layout.run(drift, cases)
        found = first["zero1 fp32"], last["zero1 fp32"]
        assert found[0]["small"] == found[1]["small"]
        assert found[0]["large"] == found[1]["large"]


def tied_drift(mesh: Mesh, layout: Layout) -> tuple:
    """What is found of a tied embedding after a step, with a difference on the last rank, and after it is mended."""
    config = layout.config(MODELS["tied"])
    engine, found = Engine(Objective(model_for(config, mesh)), config, mesh), []
    for step in range(3):
        take_step(engine, config, mesh, step)
    found.append(mend_replicas(engine, 3, 0.0, "go back"))
    if torch.distributed.get_rank() == torch.distributed.get_world_size() - 1:
        engine.held(engine.model.embedding.weight)[3].mul_(SMALL)
    for allowed in (0.0, ALLOWED, 0.0):
        try:
            found.append(together(lambda allowed=allowed: mend_replicas(engine, 3, allowed, "go back")))
        except UserError as error:
            found.append(str(error))
    return tuple(found)


@pytest.mark.slow
@pytest.mark.parametrize("layout", [Layout(pipeline=3), Layout(pipeline=2, data=3), Layout(pipeline=2, tensor=2)])
def test_drift_between_both_places_of_a_tied_embedding(layout):
    """After several steps both are alike bit for bit, whatever the order in which data ranks add up."""
    where = "copies of the model" if layout.data > 1 else "the ends of the pipeline"
    for alike, exact, small, mended in layout.run(tied_drift):
        assert alike is mended is None
        assert f"embedding.weight differs between {where} by " in exact
        assert (small.parameters, 0 < small.size < ALLOWED) == (1, True)


def runs(mesh: Mesh, commands: dict[str, list[str]]) -> dict[str, Attempt]:
    """A run that drifts a little before step 3 and is mended, and one that is spoilt after its first checkpoint."""
    mend, seen = replicas.mend_replicas, {}
    for name, command in commands.items():

        def spoilt(engine: Engine, step: int, *rest, name=name):
            if (name, step) in (("small", 3), ("large", 6)):
                spoil(engine, SMALL if name == "small" else math.nan)
            return mend(engine, step, *rest)

        loop.mend_replicas, loop.allowed_drift = spoilt, lambda *_: ALLOWED
        seen[name] = attempt(mesh, command)
    return seen


def test_a_run_says_what_was_mended_and_which_checkpoint_is_whole(corpus, tmp_path):
    settings = {"parallel__tensor": 2, "parallel__replica_check_interval": 3, "training__eval_interval": 0}
    commands = {name: tiny_arguments(corpus, tmp_path / name, **settings) for name in ("small", "large")}
    first, second = run_distributed(runs, 2, commands)
    assert first["small"].end == second["small"].end == "finished"
    assert "step 3  warning: 1 parameter had drifted apart by " in first["small"].printed
    drifts = {record["step"]: record.get("replica_drift") for record in read_metrics(tmp_path / "small")}
    assert {step for step, size in drifts.items() if size} == {3}
    assert first["large"].end == second["large"].end
    assert "after step 6, transformer.norm.weight differs between tensor ranks by inf of" in first["large"].end
    assert f"; resume from {tmp_path}/large/checkpoints/step-00000004, on other nodes" in first["large"].end


def test_every_bit_counts_on_cpus_and_where_it_is_asked_for():
    config, strict = small_config(), small_config(training__deterministic="true")
    assert allowed_drift(config, torch.device("cpu")) == 0
    assert allowed_drift(strict, torch.device("cuda")) == 0
    assert allowed_drift(config, torch.device("cuda")) == config.parallel.replica_tolerance > 0
