"""DeepSpeed at every ZeRO stage computes what one process computes: loss, gradients, their norm, updated weights."""

import subprocess
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from torch import Tensor

from benchmarks.communication import LAYOUTS, Count, configuration, count_step
from megatron_ponder.config.deepspeed import deepspeed_config
from megatron_ponder.parallel.mesh import Mesh
from megatron_ponder.training import deepspeed_engine
from megatron_ponder.training.deepspeed_engine import Engine
from megatron_ponder.training.objective import Objective
from megatron_ponder.training.schedules import training_rule
from tests.training.layouts import (
    LENGTH,
    MODELS,
    MUON,
    REFINEMENTS,
    Layout,
    Run,
    assert_equal_to_one_process,
    assert_near_one_process,
    batch_of,
    model_for,
    train_all,
)

LLAMA, NEOX = MODELS["llama adaptive"], MODELS["gpt_neox adaptive"]
STAGES = {f"zero{stage}": {"parallel__zero_stage": stage} for stage in (0, 1, 2, 3)}
CASES = {name: LLAMA | stage for name, stage in STAGES.items()} | {
    "zero2 recompute": LLAMA | STAGES["zero2"] | {"training__recompute": "block"},
    "zero3 gpt_neox": NEOX | STAGES["zero3"],
    "zero1 fixed": MODELS["llama fixed"] | STAGES["zero1"],
    "zero2 muon": NEOX | STAGES["zero2"] | MUON,
}
LOW_PRECISION = {f"{name} bf16": LLAMA | stage | {"training__precision": "bf16"} for name, stage in STAGES.items()} | {
    "zero1 muon bf16": LLAMA | STAGES["zero1"] | MUON | {"training__precision": "bf16"},
}
OFFLOADED = {
    f"{name} offload": LLAMA | STAGES[name] | {"parallel__offload_optimizer": "cpu"}
    for name in ("zero1", "zero2", "zero3")
} | {"zero1 muon offload": LLAMA | STAGES["zero1"] | MUON | {"parallel__offload_optimizer": "cpu"}}
TWO_RANKS = Layout(data=2)
WRAPPERS = {  # DeepSpeed's class around the optimiser, of a precision and a stage
    ("fp32", 0): "AdamW",
    ("fp32", 1): "DeepSpeedZeroOptimizer",
    ("fp32", 2): "DeepSpeedZeroOptimizer",
    ("fp32", 3): "DeepSpeedZeroOptimizer_Stage3",
    ("bf16", 0): "DeepSpeedZeroOptimizer",
    ("bf16", 1): "DeepSpeedZeroOptimizer",
    ("bf16", 2): "DeepSpeedZeroOptimizer",
    ("bf16", 3): "DeepSpeedZeroOptimizer_Stage3",
}
COUNTED = [("fp32", 1), ("bf16", 1), ("bf16", 2)]


def overlapping(*arguments) -> dict:
    """DeepSpeed's configuration with the overlap that GPUs have, and buckets that are smaller than some parameters."""
    made = deepspeed_config(*arguments)
    changed = {"overlap_comm": True, "reduce_bucket_size": 500, "allgather_bucket_size": 500}
    return made | {"zero_optimization": made["zero_optimization"] | changed}


def wrapper_of(mesh: Mesh, precision: str, stage: int) -> str:
    config = TWO_RANKS.config(LLAMA | {"training__precision": precision, "parallel__zero_stage": stage})
    return type(Engine(Objective(model_for(config, mesh)), config, mesh)._engine.optimizer).__name__


def refuse(*arguments, **_) -> None:
    raise AssertionError(f"a process is started: {arguments}")


class Seen(SimpleNamespace):
    """What one of two ranks has seen: runs, runs with overlap, wrappers, and messages by precision and stage."""


def see_all(mesh: Mesh, layout: Layout) -> Seen:
    """Everything in one start of the ranks, in which nobody may run a compiler."""
    with mock.patch.object(subprocess, "Popen", refuse):
        runs = train_all(mesh, layout, CASES | LOW_PRECISION)
        with mock.patch.object(deepspeed_engine, "deepspeed_config", overlapping):
            overlapped = train_all(mesh, layout, {name: LOW_PRECISION[name] for name in ("zero1 bf16", "zero2 bf16")})
        wrappers = {case: wrapper_of(mesh, *case) for case in WRAPPERS}
        counts = {case: count(mesh, *case) for case in COUNTED}
        muon = count(mesh, "bf16", 1, optimizer__name="muon", model__num_layers=3)  # of which ranks share one
    return Seen(runs=runs, overlapped=overlapped, wrappers=wrappers, counts=counts, muon=muon)


def count(mesh: Mesh, precision: str, stage: int, **overrides) -> Count:
    config = configuration(LAYOUTS[f"dp2 zero{stage}"], "adaptive", LENGTH, training__precision=precision, **overrides)
    return count_step(mesh, config)


@pytest.fixture(scope="module")
def two_ranks() -> list[Seen]:
    """All that two data-parallel ranks have seen, started once because importing DeepSpeed takes seconds."""
    return TWO_RANKS.run(see_all, time_limit=1500)


def runs_of(two_ranks: list[Seen], case: str) -> list[Run]:
    return [seen.runs[case] for seen in two_ranks]


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_equal_one_process(two_ranks, case):
    assert_equal_to_one_process(TWO_RANKS, CASES[case], runs_of(two_ranks, case))


@pytest.mark.parametrize("case", LOW_PRECISION)
def test_bf16_stays_near_fp32_with_fp32_master_weights(two_ranks, case):
    assert_near_one_process(TWO_RANKS, LOW_PRECISION[case], runs_of(two_ranks, case))


def sums_of_bf16_gradients(case: dict, dtype: torch.dtype) -> dict[str, Tensor]:
    """Gradients of the first step by plain PyTorch: in bf16 of each micro-batch, summed in some type."""
    config = TWO_RANKS.config(case)
    model = model_for(config).bfloat16()
    objective, sums = Objective(model), {}
    for tokens in batch_of(config, 0).split(config.training.micro_batch_size):
        penalty = config.ponder_training.penalty_weight
        total, _ = objective(tokens, REFINEMENTS[0], training_rule(0, config), penalty)
        (total * (1 / (config.training.global_batch_size * LENGTH) * TWO_RANKS.data)).backward()
        for name, parameter in model.named_parameters():
            sums[name] = (sums.get(name, 0) + parameter.grad.float() / TWO_RANKS.data).to(dtype)
            parameter.grad = None
    return sums


@pytest.mark.parametrize("case", ["zero1 bf16", "zero2 bf16"])
def test_gradients_of_bf16_are_summed_in_fp32(two_ranks, case):
    expected = sums_of_bf16_gradients(LOW_PRECISION[case], torch.float32)
    rounded = sums_of_bf16_gradients(LOW_PRECISION[case], torch.bfloat16)
    norm = torch.stack([gradient.norm() for gradient in expected.values()]).norm()
    for run in (run for seen in two_ranks for run in (seen.runs[case], seen.overlapped[case])):
        assert run.steps[0].norm == pytest.approx(float(norm), rel=1e-6)
        for name, gradient in run.steps[0].gradients.items():
            error = (gradient.float() - expected[name]).norm()
            assert error < 1e-4 * expected[name].norm(), name
            assert error < 0.1 * (rounded[name].float() - expected[name]).norm(), name


@pytest.mark.parametrize("case", WRAPPERS, ids=lambda case: "-".join(map(str, case)))
def test_the_class_around_the_optimiser_is_known(two_ranks, case):
    assert [seen.wrappers[case] for seen in two_ranks] == [WRAPPERS[case]] * 2


@pytest.mark.parametrize("case", COUNTED, ids=lambda case: "-".join(map(str, case)))
def test_messages_of_data_ranks_are_those_of_estimates(two_ranks, case):
    for seen in two_ranks:
        assert seen.counts[case].measured == seen.counts[case].expected()


def test_data_ranks_send_each_other_what_muon_lacks_of_a_matrix(two_ranks):
    """The matrix through which ZeRO's cut goes; estimates have the mean of the ranks."""
    send, sent = ("copies", "send"), []
    for seen in two_ranks:
        measured, expected = seen.muon.measured, seen.muon.expected()
        assert measured.keys() == expected.keys()
        assert {key: value for key, value in measured.items() if key != send} == {
            key: value for key, value in expected.items() if key != send
        }
        assert measured[send].calls == expected[send].calls == 1
        sent.append(measured[send].bytes)
    assert sum(sent) in (64 * 64 * 2, 64 * 176 * 2)  # all of one matrix, in bf16
    assert sum(sent) == 2 * expected[send].bytes


def test_one_rank_equals_one_process():
    case = LLAMA | STAGES["zero2"]
    (runs,) = Layout().run(train_all, {"alone": case})
    assert_equal_to_one_process(Layout(), case, [runs["alone"]])


@pytest.mark.parametrize(("kind", "counted"), [(torch.optim.AdamW, [7]), (torch.optim.SGD, [])])
def test_steps_are_set_where_an_optimiser_counts_them(kind, counted):
    weight = torch.nn.Parameter(torch.ones(2))
    weight.grad = torch.ones(2)
    optimizer = kind([weight], **({"momentum": 0.9} if kind is torch.optim.SGD else {}))
    optimizer.step()
    engine = object.__new__(Engine)
    engine._engine = SimpleNamespace(basic_optimizer=optimizer)
    engine.set_steps(7)
    assert [int(state["step"]) for state in optimizer.state.values() if "step" in state] == counted


@pytest.mark.slow
@pytest.mark.parametrize("case", OFFLOADED)
def test_optimizer_state_in_host_memory_equals_one_process(case):
    ranks = TWO_RANKS.run(train_all, {case: OFFLOADED[case]})
    assert_equal_to_one_process(TWO_RANKS, OFFLOADED[case], [runs[case] for runs in ranks])
