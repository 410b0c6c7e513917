"""DeepSpeed at every ZeRO stage computes what one process computes: loss, gradients, their norm, updated weights."""

from types import SimpleNamespace

import pytest
import torch

from megatron_ponder.training.deepspeed_engine import Engine
from tests.training.layouts import (
    MODELS,
    Layout,
    assert_equal_to_one_process,
    assert_near_one_process,
    train_all,
)

LLAMA, NEOX = MODELS["llama adaptive"], MODELS["gpt_neox adaptive"]
STAGES = {f"zero{stage}": {"parallel__zero_stage": stage} for stage in (0, 1, 2, 3)}
CASES = {name: LLAMA | stage for name, stage in STAGES.items()} | {
    "zero2 recompute": LLAMA | STAGES["zero2"] | {"training__recompute": "block"},
    "zero3 gpt_neox": NEOX | STAGES["zero3"],
    "zero1 fixed": MODELS["llama fixed"] | STAGES["zero1"],
}
LOW_PRECISION = {f"{name} bf16": LLAMA | stage | {"training__precision": "bf16"} for name, stage in STAGES.items()}
OFFLOADED = {
    f"{name} offload": LLAMA | STAGES[name] | {"parallel__offload_optimizer": "cpu"}
    for name in ("zero1", "zero2", "zero3")
}
TWO_RANKS = Layout(data=2)


@pytest.fixture(scope="module")
def two_ranks():
    """Every case on two data-parallel ranks, started once because importing DeepSpeed takes seconds."""
    return TWO_RANKS.run(train_all, CASES | LOW_PRECISION)


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_equal_one_process(two_ranks, case):
    assert_equal_to_one_process(TWO_RANKS, CASES[case], [runs[case] for runs in two_ranks])


@pytest.mark.parametrize("case", LOW_PRECISION)
def test_bf16_stays_near_fp32_with_fp32_master_weights(two_ranks, case):
    assert_near_one_process(TWO_RANKS, LOW_PRECISION[case], [runs[case] for runs in two_ranks])


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
