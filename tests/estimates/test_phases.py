"""What a run computes in its phases: tokens alone, with latent steps, pruned."""

import itertools

import pytest

from megatron_ponder.estimates.budget import Budget
from megatron_ponder.estimates.flops import training_flops
from megatron_ponder.estimates.phases import PhaseCost, packs, phase_costs
from tests.estimates.test_step_time import CLUSTER, config_for

LATE = {"ponder_training__latent_start": 50, "ponder_training__jacobi_iterations": 2}
PRUNED = LATE | {"ponder_training__router_start": 60, "ponder_training__prune_start": 80}


def parts(steps: float = 100, mean_steps: float | None = None, **overrides) -> list[PhaseCost]:
    config = config_for(**overrides)
    tokens = steps * config.training.global_batch_size * config.data.sequence_length
    return phase_costs(config, 32 // config.parallel.pipeline, CLUSTER, Budget(tokens, mean_steps))


def test_every_phase_has_its_steps_and_their_cost():
    plain, latents, pruned = parts(mean_steps=1.0, **PRUNED)
    assert [part.steps for part in (plain, latents, pruned)] == [50, 30, 20]
    config = config_for(**PRUNED)
    assert plain.flops == pytest.approx(50 * training_flops(config, 2, latents=False), rel=1e-12)
    assert latents.flops == 30 * training_flops(config, 2)
    assert pruned.flops == 20 * training_flops(config, 2, mean_steps=1.0)
    assert plain.phase.time.total < pruned.phase.time.total < latents.phase.time.total


def test_slots_that_are_run_once_cost_less_in_every_phase_that_has_latents():
    """A mean of 0.5 leaves steps out altogether."""
    growth, once = (parts(mean_steps=0.5, **PRUNED | {"ponder__latent_visibility": each}) for each in ("all", "own"))
    assert once[0].flops == growth[0].flops
    for more, less in zip(growth[1:], once[1:], strict=True):
        assert less.flops < more.flops and less.phase.time.total < more.phase.time.total
    assert once[2].phase.time.total < once[1].phase.time.total


def test_a_run_comes_to_the_phases_that_its_tokens_last_for():
    assert [part.phase.begin for part in parts(50, **PRUNED)] == [0]
    assert [part.steps for part in parts(70.5, **PRUNED)] == [50, 20.5]
    assert [part.steps for part in parts()] == [100]


def test_without_another_word_tokens_keep_the_budget_or_half_of_all_steps():
    budget = {"ponder_training__target_latent_steps": 0.5, "ponder_training__penalty_weight": 0.01}
    for overrides, mean in ((budget, 0.5), ({}, 1.5)):
        assert parts(**PRUNED | overrides)[-1].flops == parts(mean_steps=mean, **PRUNED)[-1].flops


def test_pipelines_leave_slots_out_too():
    _, latents, pruned = parts(mean_steps=1.0, parallel__pipeline=4, **PRUNED)
    assert pruned.phase.time.flops == parts(mean_steps=1.0, **PRUNED)[-1].phase.time.flops
    assert pruned.phase.time.total < latents.phase.time.total


@pytest.mark.parametrize("pipeline", [1, 4])
def test_compiled_blocks_leave_slots_out_too(pipeline):
    plain, compiled = (
        parts(mean_steps=1.0, parallel__pipeline=pipeline, training__compile=compiled, **PRUNED)
        for compiled in ("false", "true")
    )
    assert [cost.flops for cost in compiled] == [cost.flops for cost in plain]
    for cost, other in zip(compiled, plain, strict=True):  # what is fused moves less
        assert cost.phase.time.parts["matrices"] == other.phase.time.parts["matrices"]
        assert cost.phase.time.parts["element-wise"] < other.phase.time.parts["element-wise"]


def test_more_steps_cost_more_up_to_all_of_them():
    costs = [parts(mean_steps=mean, **PRUNED)[-1] for mean in (0.0, 0.3, 1.0, 2.2, 3.0)]
    for cheaper, dearer in itertools.pairwise(costs):
        assert cheaper.flops < dearer.flops
        assert cheaper.seconds < dearer.seconds
    assert costs[-1].phase.time.flops == parts(**LATE)[-1].phase.time.flops


@pytest.mark.parametrize(
    "overrides",
    [
        {"ponder_training__packed": "false"},
        {"ponder__mode": "fixed"},
    ],
)
def test_what_runs_every_slot_has_no_pruned_phase(overrides):
    assert not packs(config_for(**PRUNED | overrides))
    assert [part.phase.begin for part in parts(**PRUNED | overrides)] == [0, 50]


def test_a_batch_that_grows_takes_more_steps_for_the_same_tokens():
    """32 steps of a quarter of the batch, 16 of half of it, 11 of three quarters, then all of it."""
    full = config_for().training.global_batch_size
    ramp = {"training__batch_size_ramp": f"{full // 4} {full // 4} {24 * full}"}
    plain, latents = parts(**LATE | ramp)
    assert plain.steps + latents.steps == 32 + 16 + 11 + (100 - 8 - 8 - 11 * 3 / 4)
    assert (plain.steps, plain.batches + latents.batches) == (50, pytest.approx(100))
    assert plain.batches == pytest.approx(8 + 8 + 2 * 3 / 4)
    assert latents.flops == pytest.approx(latents.batches * latents.phase.time.flops)
    assert sum(part.flops for part in parts(**ramp)) == pytest.approx(sum(part.flops for part in parts()))
