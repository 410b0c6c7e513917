"""The model of a step's time: limits that it must keep, and numbers that can be worked out by hand."""

from dataclasses import replace

import pytest

from megatron_ponder.cluster.hardware import Hardware
from megatron_ponder.config import Config, read_config
from megatron_ponder.estimates.flops import training_flops
from megatron_ponder.estimates.rank import places
from megatron_ponder.estimates.schedule_walk import idle_share
from megatron_ponder.estimates.step_time import step_time
from tests.models import small_config

FAST = 1e30
CLUSTER = Hardware("GPU", 4, 8, 80e9, 1e15, 3e12, 400e9, 50e9)
# Products alone take time.
IDEAL = replace(
    CLUSTER,
    memory_bandwidth=FAST,
    intra_bandwidth=FAST,
    inter_bandwidth=FAST,
    intra_latency=0.0,
    inter_latency=0.0,
    matrix_share=1.0,
    attention_share=1.0,
)


def config_for(**overrides) -> Config:
    values = {
        "model.hidden_size": 1024, "model.num_layers": 24, "model.num_heads": 16, "model.vocab_size": 32000,
        "training.global_batch_size": 256, "training.micro_batch_size": 2,
    }  # fmt: skip
    values |= {key.replace("__", "."): value for key, value in overrides.items()}
    return read_config([f"--{key}={value}" for key, value in values.items()])


@pytest.mark.parametrize("mode", ["vanilla", "fixed", "adaptive"])
@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_work_without_anything_else_is_the_counted_operations(mode, family):
    config = config_for(ponder__mode=mode, model__family=family, ponder_training__jacobi_iterations=2)
    time = step_time(config, 32, IDEAL)
    assert time.tokens == 256 * 2048
    assert time.flops == training_flops(config, 2)
    # the kernel computes probabilities again, and keys that carry log w are longer
    channels = 96 / 64 if mode == "adaptive" else 1
    low = time.parts["matrices"] + time.parts["attention"] * 3 / (3.5 * channels)
    high = time.parts["matrices"] + time.parts["attention"] * 3 / 3.5
    assert low * 0.999 <= time.flops / (32 * IDEAL.peak) <= high * 1.001
    assert time.total == pytest.approx(time.parts["matrices"] + time.parts["attention"], rel=1e-6)


def test_tensor_ranks_divide_the_work():
    whole, halves = (step_time(config_for(parallel__tensor=t), 32 // t, IDEAL) for t in (1, 2))
    assert halves.total == pytest.approx(whole.total, rel=1e-3)
    assert halves.parts["collectives"] < 1e-9
    assert step_time(config_for(parallel__tensor=2), 16, CLUSTER).parts["collectives"] > 0


def test_muon_multiplies_matrices_once_a_step_and_data_ranks_divide_them():
    adamw, muon, alone = (
        step_time(config_for(**overrides), ranks, IDEAL).parts["optimiser"] * IDEAL.peak
        for ranks, overrides in ((32, {}), (32, {"optimizer__name": "muon"}), (1, {"optimizer__name": "muon"}))
    )
    square, wide = 6 * 1024**3, 4 * 1024**2 * 2736 + 2 * 1024**3
    operations = 24 * 5 * (4 * square + 3 * wide)
    assert adamw < 1e-6 * operations
    assert muon == pytest.approx(operations / 32, rel=1e-6)
    assert alone == pytest.approx(operations, rel=1e-6)


def test_a_pipeline_waits_as_long_as_its_schedule_says():
    # 128 micro-batches on each of 2 copies; passes of equal length wait as the formula says, growth passes longer
    shares = {}
    for mode in ("loop", "adaptive"):
        config = config_for(
            parallel__pipeline=4, training__micro_batch_size=1, ponder__mode=mode, ponder_training__jacobi_iterations=2
        )
        parts = step_time(config, 2, IDEAL).parts
        busy = parts["matrices"] + parts["attention"]
        shares[mode] = parts["bubble"] / (busy + parts["bubble"])
    assert shares["loop"] == pytest.approx(3 / (4 * 128 + 3), rel=1e-6)
    assert shares["adaptive"] == pytest.approx(idle_share("1f1b", 4, 128, (1, 2, 3, 4, 4, 4)))
    assert shares["adaptive"] > 3 * 3 / (6 * 128 + 3)


def test_reductions_hide_where_the_backward_pass_of_the_first_pass_is_long_enough():
    slow = replace(CLUSTER, inter_bandwidth=1e9)
    assert step_time(config_for(), 32, CLUSTER).hidden > 0
    exposed = step_time(config_for(), 32, slow).parts["reduction"]
    assert exposed > step_time(config_for(), 32, CLUSTER).parts["reduction"]
    vanilla = step_time(config_for(ponder__mode="vanilla", training__micro_batch_size=8), 32, slow)
    pondering = step_time(config_for(training__micro_batch_size=8), 32, slow)
    assert vanilla.hidden == pytest.approx(pondering.hidden, rel=0.05)  # its only pass is as long as the first of many
    assert step_time(config_for(parallel__pipeline=2), 16, CLUSTER).hidden == 0
    assert step_time(config_for(), 32, replace(CLUSTER, device="cpu")).hidden == 0


@pytest.mark.parametrize(
    ("cheaper", "dearer"),
    [
        ({}, {"training__recompute": "attention"}),
        ({"training__recompute": "attention"}, {"training__recompute": "block"}),
        ({"training__recompute": "block", "training__recompute_passes": 2}, {"training__recompute": "block"}),
        ({"ponder_training__gradient_passes": 2}, {}),
        ({"ponder__mode": "vanilla"}, {"ponder__mode": "fixed"}),
        ({"ponder__latent_steps": 2}, {"ponder__latent_steps": 3}),
        ({"ponder_training__jacobi_iterations": 1}, {}),
        ({}, {"parallel__pipeline": 8}),
    ],
)
def test_what_is_more_work_takes_longer(cheaper, dearer):
    def total(overrides: dict) -> float:
        return step_time(config_for(**overrides), 32 // int(overrides.get("parallel__pipeline", 1)), CLUSTER).total

    assert total(cheaper) < total(dearer)


def test_places_that_matter():
    assert places(small_config(model__num_layers=8, parallel__pipeline=4)) == [0, 3]
    assert places(small_config(model__num_layers=10, parallel__pipeline=4)) == [0, 1, 3]
    assert places(small_config()) == [0]
