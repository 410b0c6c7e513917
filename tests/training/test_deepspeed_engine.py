"""DeepSpeed at every ZeRO stage computes what one process computes: loss, gradients, their norm, updated weights."""

import pytest

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


@pytest.mark.slow
@pytest.mark.parametrize("case", OFFLOADED)
def test_optimizer_state_in_host_memory_equals_one_process(case):
    ranks = TWO_RANKS.run(train_all, {case: OFFLOADED[case]})
    assert_equal_to_one_process(TWO_RANKS, OFFLOADED[case], [runs[case] for runs in ranks])
