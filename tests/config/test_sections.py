"""The configuration: sources and their order, refusals and what they say, the resolved form, the shipped examples."""

import math
import re
from dataclasses import fields, replace
from pathlib import Path
from typing import get_args

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.pipelining.schedules import ScheduleInterleaved1F1B, ScheduleInterleavedZeroBubble

from megatron_ponder.base.errors import UserError
from megatron_ponder.base.launch import Launch
from megatron_ponder.config import (
    Config,
    InferenceConfig,
    ModelConfig,
    ParallelConfig,
    PonderConfig,
    PonderTrainingConfig,
    TrainingConfig,
    architecture,
    check_layout,
    data_parallel_size,
    load_config,
    micro_batches,
    read_config,
    resolve,
    stage_layers,
    to_yaml,
    validate,
)
from megatron_ponder.config.layout import fits_schedule
from megatron_ponder.config.ponder import Mode
from megatron_ponder.config.run import BatchRampConfig
from megatron_ponder.estimates.schedule_walk import stages_on_paper
from megatron_ponder.model.ponder import PonderLM
from tests import REPOSITORY

EXAMPLES = REPOSITORY / "examples" / "configs"


def read(**overrides) -> Config:
    """Read from a command line; overrides are written `model__hidden_size=64`."""
    return read_config([f"--{key.replace('__', '.')}={value}" for key, value in overrides.items()])


@pytest.fixture
def write(tmp_path):
    """Write a YAML file and return the arguments that name it."""

    def write_file(text: str, name: str = "config.yaml") -> list[str]:
        (tmp_path / name).write_text(text)
        return ["--config", str(tmp_path / name)]

    return write_file


def refusal(arguments: list[str]) -> str:
    """What `read_config` says to arguments that it refuses: one line, the same on every rank."""
    with pytest.raises(UserError) as caught:
        read_config(arguments)
    assert caught.value.shared
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Values -----------------------------------------------------------------------------------------------------------


def test_defaults_are_the_reference_recipe():
    config = read_config([])
    assert config.optimizer.learning_rate == 3e-4
    assert config.optimizer.min_learning_rate_fraction == 0.1
    assert config.optimizer.warmup_fraction == 0.02
    assert config.optimizer.betas == (0.9, 0.95)
    assert config.optimizer.weight_decay == 0.1
    assert (config.training.precision, config.training.steps, config.data.sequence_length) == ("bf16", 50_000, 2048)
    assert (config.ponder.mode, config.ponder.latent_steps) == ("adaptive", 3)
    assert (config.ponder_training.refinement_choices, config.ponder_training.penalty_weight) == ((2, 3), 0)
    assert (config.inference.threshold, config.inference.router_bias) == (1e-4, 0)


@pytest.mark.parametrize(
    ("given_fields", "expected"),
    [
        ({"model__hidden_size": 1024, "model__num_heads": 16}, {"ffn_hidden_size": 2736, "num_kv_heads": 16}),
        ({"model__family": "gpt_neox", "model__hidden_size": 96}, {"ffn_hidden_size": 384, "rotary_fraction": 0.25}),
        ({"model__family": "llama"}, {"ffn_hidden_size": 2048, "rotary_fraction": 1.0}),
        ({"data__sequence_length": 512}, {"max_position_embeddings": 512}),
        ({"model__num_kv_heads": 4, "model__ffn_hidden_size": 100}, {"num_kv_heads": 4, "ffn_hidden_size": 100}),
        ({"model__max_position_embeddings": 4096}, {"max_position_embeddings": 4096}),
        ({"model__num_kv_heads": "null"}, {"num_kv_heads": 12}),
    ],
)
def test_derived_fields_of_the_model(given_fields, expected):
    model = read(**given_fields).model
    assert {name: getattr(model, name) for name in expected} == expected


@pytest.mark.parametrize("mode", ["vanilla", "fixed", "adaptive", "pause", "sps", "loop", "ponderlm"])
def test_embedding_scale_and_steps_follow_the_mode(mode):
    config = read(ponder__mode=mode, model__hidden_size=96, ponder__latent_steps=2)
    assert config.ponder.embedding_scale == (1.0 if mode == "vanilla" else math.sqrt(2.5 * 96))
    assert config.ponder.steps == (0 if mode == "vanilla" else 2)
    assert read(ponder__mode=mode, ponder__embedding_scale=2.0).ponder.embedding_scale == 2.0


@pytest.mark.parametrize(("given_value", "choices"), [("4", (4,)), ("0", (0,)), ("[1,3]", (1, 3))])
def test_refinements_are_a_number_or_a_list(given_value, choices):
    training = read(ponder_training__jacobi_iterations=given_value).ponder_training
    assert training.refinement_choices == choices
    assert training.evaluation_refinements == max(choices)


def test_later_sources_win(write):
    first = write("model:\n  hidden_size: 96\n  num_layers: 3\noptimizer:\n  betas: [0.8, 0.9]\n", "first.yaml")
    second = write("model:\n  num_layers: 5\n", "second.yaml")
    config = read_config([*first, *second, "--model.num_heads", "4", "--model.num_heads=6"])
    assert (config.model.hidden_size, config.model.num_layers, config.model.num_heads) == (96, 5, 6)
    assert config.optimizer.betas == (0.8, 0.9)
    assert read_config(["--model.hidden_size", "48", *first]).model.hidden_size == 96
    assert read_config([*first, "--model.hidden_size", "48"]).model.hidden_size == 48


def test_numbers_may_be_written_in_the_usual_ways(write):
    arguments = write("optimizer:\n  learning_rate: 3e-4\n  weight_decay: 0\n")  # PyYAML reads 3e-4 as a string
    assert read_config(arguments).optimizer.learning_rate == 3e-4
    assert read_config(arguments).optimizer.weight_decay == 0.0
    assert read(inference__router_bias="-1.5").inference.router_bias == -1.5


def test_help_lists_every_key(capsys):
    with pytest.raises(SystemExit) as caught:
        read_config(["--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    for section in fields(Config):
        for item in fields(section.default_factory):
            assert f"--{section.name}.{item.name}" in text


# Unknown keys and wrong types -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--model.hiden_size", "64"], "key model.hiden_size on the command line; did you mean model.hidden_size?"),
        (["--pondr.mode=fixed"], "key pondr.mode on the command line; did you mean ponder.mode?"),
        (["--ponder.hidden_size", "64"], "did you mean model.hidden_size?"),
        (["--training.learning_rate", "1"], "did you mean optimizer.learning_rate?"),
        (["--logging.keep", "1"], "did you mean checkpoint.keep?"),
        (["--hidden_size", "64"], "did you mean model.hidden_size?"),
        (
            ["--qqqq.zzzz", "1"],
            "sections are model, ponder, ponder_training, inference, parallel, data, tokenizer",
        ),
        (["model.hidden_size", "64"], '"model.hidden_size" is no option; write --key value'),
        (["--config"], "--config has no value; write --config VALUE"),
        (["--config", "missing.yaml"], "no configuration file missing.yaml; check the path given with --config"),
        (["--config=missing.yaml"], "no configuration file missing.yaml"),
    ],
)
def test_unknown_arguments(arguments, said):
    assert said in refusal(arguments)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("model:\n  hiden_size: 64\n", "key model.hiden_size in {path}; did you mean model.hidden_size?"),
        ("modle:\n  num_layers: 64\n", "did you mean model.num_layers?"),
        ("optimizer:\n  seed: 1\n", "did you mean training.seed?"),
        ("modle: 5\n", "unknown configuration section modle in {path}; did you mean model?"),
        ("hidden_size: 64\n", "put `hidden_size` below `model:`"),
        ("model.hidden_size: 64\n", "put `hidden_size` below `model:`"),
        ("model: 5\n", "section `model` in {path} must hold keys below it"),
        ("model:\n", "section `model` in {path} must hold keys below it"),
        ("# nothing\n", "{path} must hold sections such as `model:`"),
        ("- model\n", "{path} must hold sections such as `model:`"),
        ("model: [\n", "{path} is not valid YAML"),
        ("model:\n  hidden_size: wide\n", "model.hidden_size is wide; write a whole number"),
    ],
)
def test_faulty_files(write, text, said):
    arguments = write(text)
    assert said.format(path=arguments[1]) in refusal(arguments)


def test_a_file_that_is_not_text_is_refused(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_bytes(b"\xff\xfe\x00\x80")
    assert f"{path} is UTF-16 text: convert it to UTF-8" in refusal(["--config", str(path)])


@pytest.mark.parametrize(
    ("key", "value", "number"),
    [
        ("training.steps", "1e6", 10**6),
        ("training.steps", "2.5e3", 2500),
        ("ponder_training.latent_start", "1e3", 1000),
        ("ponder_training.jacobi_iterations", "[1e0, 2]", [1, 2]),
        ("training.batch_size_ramp", "4 4 1e3", BatchRampConfig(4, 4, 1000)),
        ("optimizer.learning_rate", "1e0", 1.0),
    ],
)
def test_a_whole_number_may_have_an_exponent(key, value, number, tmp_path):
    section, name = key.split(".")
    (tmp_path / "run.yaml").write_text(f"{section}:\n  {name}: {value}\n", encoding="utf-8")
    for arguments in ([f"--{key}={value}"], ["--config", str(tmp_path / "run.yaml")]):
        found = getattr(getattr(read_config(arguments), section), name)
        assert found == number and type(found) is type(number)


@pytest.mark.parametrize(
    ("key", "value", "got"),
    [
        ("training.steps", "1e13", "training.steps is 1e13; its range is 1 to 1e12"),
        ("training.steps", "1e-3", "training.steps is 0.001; write a whole number"),
        ("model.hidden_size", "wide", "wide"),
        ("model.hidden_size", "1.5", "1.5"),
        ("model.hidden_size", "true", "true; write a whole number"),
        ("model.family", "gpt2", "gpt2"),
        ("ponder.mode", "slow", "slow"),
        ("ponder_training.jacobi_iterations", "[1, x]", "x"),
        ("ponder_training.jacobi_iterations", "{1: 0.5, 2: 0.5}", "keys with a whole number each"),
        ("ponder_training.jacobi_iterations", "{1:3, 2:1}", "each; put a space behind every colon"),
        ("ponder_training.jacobi_iterations", "true", "is true; write a whole number, a list of whole numbers or keys"),
        ("ponder_training.jacobi_iterations", "'3'", "is '3'; write a whole number"),
        ("optimizer.betas", "[0.9]", "0.9"),
        ("optimizer.learning_rate", "fast", "fast"),
        ("training.precision", "fp16", "fp16"),
        ("parallel.sequence_parallel", "maybe", "maybe"),
    ],
)
def test_wrong_types(key, value, got):
    said = refusal([f"--{key}", value])
    assert key in said
    assert got in said


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("training.steps", "is null; write a whole number, or leave it out"),
        ("ponder_training.jacobi_iterations", "is null; write a whole number, a list of whole numbers or keys"),
        ("optimizer.betas", "is null; write a list of 2 numbers"),
    ],
)
def test_a_key_with_nothing_behind_it_is_refused(key, said, tmp_path):
    section, _, name = key.partition(".")
    path = tmp_path / "run.yaml"
    path.write_text(f"{section}:\n  {name}:\n", encoding="utf-8")
    assert f"{key} {said}" in refusal(["--config", str(path)])


# Validation -------------------------------------------------------------------------------------------------------


ON_BATCH = {
    "ponder_training__penalty": "batch",
    "ponder_training__penalty_weight": 1,
    "ponder_training__penalty_prior": 0.5,
}


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ({"model__hidden_size": 100}, "100 is not divisible by model.num_heads 12; choose a multiple, for example 108"),
        ({"model__num_kv_heads": 5}, "model.num_heads 12 is not divisible by model.num_kv_heads 5"),
        ({"model__family": "gpt_neox", "model__rotary_fraction": 0.3}, "head of 64 channels is 19.2; it must be a pos"),
        ({"model__hidden_size": 36}, "model.rotary_fraction 1.0 of a head of 3 channels is 3"),
        ({"ponder__latent_steps": 0}, "ponder.mode adaptive needs ponder.latent_steps of at least 1, not 0"),
        ({"ponder__mode": "fixed", "ponder__latent_steps": 0}, "ponder.mode fixed needs ponder.latent_steps"),
        ({"ponder__mode": "loop", "ponder__latent_steps": 0}, "ponder.mode loop needs ponder.latent_steps"),
        ({"ponder_training__jacobi_iterations": "[]"}, "ponder_training.jacobi_iterations is []; give a number"),
        ({"ponder_training__target_latent_steps": 0.5}, "needs a ponder_training.penalty_weight above 0 to begin with"),
        (
            {"ponder_training__target_latent_steps": 9, "ponder_training__penalty_weight": 0.1},
            "ponder_training.target_latent_steps 9.0 must lie between 0 and ponder.latent_steps 3",
        ),
        (
            {
                "ponder_training__latent_start": 7,
                "ponder_training__latent_warmup": 5,
                "ponder_training__router_start": 9,
            },
            "latent_warmup 5 ends after ponder_training.router_start 9, from which the router gives latent steps their "
            "weight; set that to at least 12",
        ),
        (
            {"ponder__mode": "pause", "ponder__latent_visibility": "own"},
            "ponder.latent_visibility own has no meaning with ponder.mode pause; leave it out",
        ),
        (
            {"ponder__mode": "sps", "ponder_training__latent_start": 5},
            "latent_start 5 has no meaning with ponder.mode sps",
        ),
        (
            {"ponder_training__penalty_start": 5},
            "ponder_training.penalty_start 5 must lie between 0 and ponder_training.penalty_end 0",
        ),
        (
            {"ponder_training__penalty": "batch", "ponder_training__penalty_weight": 1},
            "needs a penalty_prior, such as the",
        ),
        (
            {"ponder_training__penalty": "batch", "ponder_training__penalty_prior": 0.5},
            "and a penalty_weight, such as 1",
        ),
        ({"ponder_training__penalty_prior": 0.5}, "penalty_prior 0.5 is for ponder_training.penalty batch; set that"),
        (ON_BATCH | {"ponder_training__penalty_prior": "[0.5, 0.5]"}, "must be 4 shares that sum to 1"),
        (ON_BATCH | {"ponder_training__penalty_prior": "[0.5, 0.5, 0.5, 0.5]"}, "must be 4 shares that sum to 1"),
        (
            ON_BATCH | {"ponder_training__penalty_prior": "[0.5, 0.5, 0.0, 0.0]"},
            "penalty_prior is 0; its range is above 0",
        ),
        (ON_BATCH | {"ponder_training__target_latent_steps": 1}, "leave ponder_training.target_latent_steps out"),
        ({"parallel__tensor": 8}, "8 does not divide model.num_heads 12; the largest that works is parallel.tensor 4"),
        (
            {"parallel__tensor": 6, "model__num_kv_heads": 4},
            "6 does not divide model.num_kv_heads 4, and grouped-query heads are not replicated; "
            "the largest that works is parallel.tensor 4",
        ),
        (
            {"parallel__tensor": 6, "model__num_kv_heads": 3, "model__ffn_hidden_size": 2304},
            "and grouped-query heads are not replicated; the largest that works is parallel.tensor 3",
        ),
        (
            {"parallel__tensor": 4, "model__ffn_hidden_size": 1026},
            "4 does not divide model.ffn_hidden_size 1026; the largest that works is parallel.tensor 3",
        ),
        ({"parallel__sequence_parallel": "true"}, "parallel.sequence_parallel needs parallel.tensor of at least 2"),
        (
            {"parallel__pipeline": 13},
            "parallel.pipeline 13 leaves ranks without a block, as model.num_layers is 12; set parallel.pipeline to 12",
        ),
        (
            {"parallel__pipeline": 3, "parallel__pipeline_layers": "[6,6]"},
            "parallel.pipeline_layers [6, 6] must be 3 numbers from 1 up, one for each of parallel.pipeline, whose sum "
            "is model.num_layers 12; [4, 4, 4] is",
        ),
        ({"parallel__pipeline": 2, "parallel__pipeline_layers": "[6,5]"}, "num_layers 12; [6, 6] is"),
        ({"parallel__pipeline": 2, "parallel__pipeline_layers": "[]"}, "must be 2 numbers from 1 up"),
        ({"parallel__pipeline_layers": "[4,4,4]"}, "set parallel.pipeline to 3 or leave parallel.pipeline_layers out"),
        (
            {"parallel__pipeline": 2, "parallel__pipeline_schedule": "zero_bubble"},
            "parallel.pipeline_schedule zero_bubble adds up gradients in the type of the weights",
        ),
        ({"parallel__pipeline_schedule": "zero_bubble"}, "zero_bubble needs parallel.pipeline of at least 2; leave"),
        (
            {
                "parallel__pipeline": 2,
                "parallel__pipeline_schedule": "zero_bubble",
                "training__precision": "fp32",
                "training__recompute": "block",
            },
            "training.recompute block saves nothing with parallel.pipeline_schedule zero_bubble, which keeps all that "
            "it has computed again; set parallel.pipeline_schedule to 1f1b, or training.recompute to attention",
        ),
        (
            {"parallel__pipeline": 2, "parallel__zero_stage": 2},
            "gradients of several passes and micro-batches are in flight on a rank, so that they cannot be partitioned "
            "before the step; set parallel.zero_stage to 1, or parallel.pipeline to 1",
        ),
        ({"parallel__pipeline": 2, "parallel__zero_stage": 3}, "parallel.zero_stage 3 cannot be used with parallel.pi"),
        (
            {"parallel__pipeline": 2, "ponder_training__gradient_passes": 2},
            "every pass must hand a gradient back to the one before; leave ponder_training.gradient_passes out",
        ),
        (
            {"parallel__offload_optimizer": "cpu", "parallel__zero_stage": 0},
            "parallel.offload_optimizer cpu moves what ZeRO has partitioned; set parallel.zero_stage to 1, 2 or 3",
        ),
        (
            {"parallel__offload_optimizer": "nvme", "parallel__offload_nvme_path": "/scratch"},
            "parallel.offload_optimizer nvme needs parallel.zero_stage 3, not 1; set it to 3, or offload to cpu",
        ),
        ({"parallel__offload_optimizer": "nvme", "parallel__zero_stage": 3}, "set parallel.offload_nvme_path"),
        ({"parallel__offload_nvme_path": "/scratch"}, "not used with parallel.offload_optimizer none; leave it out"),
        ({"training__recompute_passes": 2}, "recomputes nothing while training.recompute is none; set training.recom"),
        ({"training__eval_samples": 0}, "training.eval_samples must be at least 1"),
        ({"checkpoint__interval": 20, "checkpoint__keep_every": 50}, "set it to a multiple, such as 60"),
        ({"model__max_position_embeddings": 1024}, "data.sequence_length 2048 is longer than model.max_position_embed"),
    ],
)
def test_contradictions_are_refused(overrides, said):
    assert said in refusal([f"--{key.replace('__', '.')}={value}" for key, value in overrides.items()])


@pytest.mark.parametrize(
    "overrides",
    [
        {"ponder__mode": "vanilla", "ponder__latent_steps": 0},
        {"ponder__mode": "fixed", "ponder_training__penalty_weight": 0.1},
        ON_BATCH,
        ON_BATCH | {"ponder_training__penalty_prior": "[0.4, 0.3, 0.2, 0.1]"},
        ON_BATCH | {"ponder_training__penalty_prior": "[0.6, 0.4]", "ponder__mode": "loop"},
        {"ponder__mode": "ponderlm", "parallel__pipeline": 2, "ponder_training__penalty_weight": 0.1},
        {"training__eval_interval": 0, "training__eval_samples": 0},
        {"inference__threshold": 0},
        {"inference__threshold": 1},
        {"model__family": "gpt_neox", "model__rotary_fraction": 1},
        {"model__num_kv_heads": 1},
        {"parallel__tensor": 12, "model__ffn_hidden_size": 2304},
        {"parallel__tensor": 2, "parallel__sequence_parallel": "true", "model__num_kv_heads": 2},
        {"parallel__tensor": 2, "parallel__zero_stage": 3, "model__tie_embeddings": "true"},
        {
            "parallel__pipeline": 12,
            "parallel__pipeline_schedule": "zero_bubble",
            "parallel__zero_stage": 0,
            "training__precision": "fp32",
        },
        {"parallel__pipeline": 3, "parallel__pipeline_layers": "[1,10,1]"},
        {"parallel__offload_optimizer": "cpu", "parallel__offload_pin_memory": "true"},
        {
            "parallel__offload_optimizer": "nvme",
            "parallel__offload_nvme_path": "/scratch",
            "parallel__zero_stage": 3,
        },
        {"parallel__replica_check_interval": 0},
        {"training__recompute": "attention", "training__recompute_passes": 1},
    ],
)
def test_edges_are_accepted(overrides):
    read(**overrides)


def test_the_suggested_hidden_size_is_accepted():
    said = refusal(["--model.hidden_size", "1000", "--model.num_heads", "24"])
    suggested = int(re.search(r"for example (\d+)", said).group(1))
    assert 1000 <= suggested < 1000 + 24
    assert read(model__hidden_size=suggested, model__num_heads=24).model.hidden_size == suggested


# Layouts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layers", "pipeline", "counts"),
    [
        (12, 1, [12]),
        (12, 4, [3, 3, 3, 3]),
        (13, 2, [7, 6]),
        (13, 3, [4, 5, 4]),
        (14, 3, [5, 5, 4]),
        (13, 4, [3, 4, 3, 3]),
        (14, 4, [3, 4, 4, 3]),
        (23, 5, [4, 5, 5, 5, 4]),
        (5, 5, [1, 1, 1, 1, 1]),
    ],
)
def test_the_ranks_in_the_middle_have_one_block_more(layers, pipeline, counts):
    config = read(model__num_layers=layers, parallel__pipeline=pipeline)
    assert [len(blocks) for blocks in stage_layers(config)] == counts


@given(layers=st.integers(1, 200), data=st.data())
def test_every_block_is_on_one_rank_in_order(layers, data):
    pipeline = data.draw(st.integers(1, layers))
    stages = stage_layers(Config(model=ModelConfig(num_layers=layers), parallel=ParallelConfig(pipeline=pipeline)))
    assert [index for blocks in stages for index in blocks] == list(range(layers))
    counts = [len(blocks) for blocks in stages]
    assert len(counts) == pipeline
    assert max(counts) - min(counts) <= 1
    assert counts[-1] == min(counts)


@given(counts=st.lists(st.integers(1, 9), min_size=2, max_size=6))
def test_given_counts_are_kept(counts):
    config = resolve(
        Config(
            model=ModelConfig(num_layers=sum(counts)),
            parallel=ParallelConfig(pipeline=len(counts), pipeline_layers=counts),
        )
    )
    stages = stage_layers(validate(config))
    assert [len(blocks) for blocks in stages] == counts
    assert [index for blocks in stages for index in blocks] == list(range(sum(counts)))


def layout(tensor=1, pipeline=1, global_batch=256, micro_batch=8, **others) -> Config:
    config = Config(
        model=ModelConfig(ffn_hidden_size=2304),
        parallel=ParallelConfig(tensor=tensor, pipeline=pipeline, **others),
        training=TrainingConfig(global_batch_size=global_batch, micro_batch_size=micro_batch, precision="fp32"),
    )
    return validate(resolve(config))


@pytest.mark.parametrize(
    ("config", "world_size", "expected"), [(layout(), 1, 1), (layout(), 32, 32), (layout(tensor=2, pipeline=2), 16, 4)]
)
def test_data_parallel_size(config, world_size, expected):
    assert data_parallel_size(config, world_size) == expected
    assert micro_batches(config, expected) == 256 // 8 // expected


@pytest.mark.parametrize(
    ("config", "world_size", "flags"),
    [
        (layout(tensor=2, pipeline=2), 6, "--parallel.pipeline 1 --training.global_batch_size 264"),
        (layout(tensor=4, global_batch=48), 6, "--parallel.tensor 3"),
        (layout(tensor=12, global_batch=64), 8, "--parallel.tensor 4"),
        (layout(tensor=2, global_batch=35, micro_batch=1, sequence_parallel=True), 5, "{1} {0} false"),
        (
            layout(pipeline=4, global_batch=48, pipeline_schedule="zero_bubble"),
            3,
            "--parallel.pipeline 3",
        ),
        (
            layout(pipeline=4, global_batch=40, pipeline_schedule="zero_bubble", pipeline_layers=[2, 4, 4, 2]),
            5,
            "--parallel.pipeline 1 --parallel.pipeline_layers null --parallel.pipeline_schedule 1f1b",
        ),
    ],
)
def test_ranks_that_do_not_divide_are_refused_with_the_nearest_layout(config, world_size, flags):
    size = config.parallel.tensor * config.parallel.pipeline
    flags = flags.format("--parallel.sequence_parallel", "--parallel.tensor 1")
    with pytest.raises(UserError) as caught:
        data_parallel_size(config, world_size)
    assert str(caught.value) == (
        f"{world_size} ranks cannot be divided into groups of parallel.tensor × parallel.pipeline = {size}; "
        f"start a multiple of {size} ranks, or add {flags}"
    )


@given(
    tensor=st.sampled_from([1, 2, 3, 4, 6, 12]),
    pipeline=st.integers(1, 12),
    batch=st.tuples(st.integers(1, 300), st.integers(1, 9)),
    ranks=st.tuples(st.integers(1, 4), st.integers(1, 16)),
    sequence=st.booleans(),
    zero_bubble=st.booleans(),
)
def test_following_what_is_said_leads_to_a_layout_that_works(tensor, pipeline, batch, ranks, sequence, zero_bubble):
    nodes, local_size = ranks
    launch = Launch(world_size=nodes * local_size, local_size=local_size)
    arguments = {
        "parallel.tensor": tensor,
        "parallel.pipeline": pipeline,
        "parallel.sequence_parallel": sequence and tensor > 1,
        "parallel.pipeline_schedule": "zero_bubble" if zero_bubble and pipeline > 1 else "1f1b",
        "training.global_batch_size": batch[0],
        "training.micro_batch_size": batch[1],
        "training.precision": "fp32",
    }
    arguments["model.ffn_hidden_size"] = 2304
    said = []
    while True:
        config = read_config([f"--{key}={value}" for key, value in arguments.items()])
        try:
            check_layout(config, launch)
        except UserError as error:
            said.append(str(error))
        else:
            break
        advice = re.findall(r"--([a-z_.0-9]+) (\S+)", said[-1])
        advice += re.findall(r"set (training\.global_batch_size) to (\d+)", said[-1])
        arguments |= dict(advice)
        assert len(said) <= 2, said
    data = data_parallel_size(config, launch.world_size)
    count = micro_batches(config, data)
    assert count * data * config.training.micro_batch_size == config.training.global_batch_size
    assert fits_schedule(count, config.parallel.pipeline)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ["--data.sequence_length=2304", "--parallel.tensor=2", "--parallel.context=4"],
            "parallel.tensor × parallel.context 8 does not divide model.num_heads 12; the largest that works is "
            "parallel.context 3",
        ),
        (
            ["--parallel.tensor=5", "--parallel.context=2"],
            "parallel.tensor × parallel.context 10 does not divide model.num_heads 12; the largest that works is "
            "parallel.tensor 4",
        ),
        (
            ["--data.sequence_length=2049", "--parallel.context=2"],
            "parallel.context 2 does not divide data.sequence_length 2049; the largest that works is "
            "parallel.context 1; or set data.sequence_length to 2048",
        ),
        (
            ["--data.sequence_length=1022", "--parallel.context=4"],
            "parallel.context 4 does not divide data.sequence_length 1022; the largest that works is "
            "parallel.context 2; or set data.sequence_length to 1020",
        ),
        (
            ["--data.sequence_length=5", "--parallel.context=12"],
            "parallel.context 12 does not divide data.sequence_length 5; the largest that works is "
            "parallel.context 1; or set data.sequence_length to 12",
        ),
    ],
)
def test_context_ranks_that_do_not_divide_are_refused_with_the_most_that_do(arguments, said):
    assert refusal(arguments).endswith(said)


def test_a_grid_with_context_ranks():
    config = layout(tensor=2, context=2, global_batch=240)
    assert data_parallel_size(config, 12) == 3
    with pytest.raises(UserError) as caught:
        data_parallel_size(config, 10)
    assert str(caught.value) == (
        "10 ranks cannot be divided into groups of parallel.tensor × parallel.context × parallel.pipeline = 4; start a "
        "multiple of 4 ranks, or add --parallel.context 1"
    )
    few_keys = ["--model.num_kv_heads=3", "--data.sequence_length=2304", "--parallel.context=12"]
    assert read_config(few_keys).parallel.context == 12


def test_tensor_ranks_stay_inside_a_node():
    config = layout(tensor=4, global_batch=240)
    check_layout(config, Launch(world_size=12, local_size=4))
    check_layout(config, Launch(world_size=4, local_size=4))
    for local_rank in (0, 1):
        with pytest.raises(UserError) as caught:
            check_layout(config, Launch(rank=6 + local_rank, world_size=12, local_rank=local_rank, local_size=6))
        assert str(caught.value) == (
            "parallel.tensor 4 does not divide the 6 ranks of a node, and tensor ranks stay inside a node; "
            "start a multiple of 4 ranks on each node, or add --parallel.tensor 2"
        )
        assert caught.value.shared == (local_rank == 1)  # one report for each such node


def test_ranks_of_a_node_must_be_neighbours():
    config = read(parallel__tensor=2, training__global_batch_size=16)
    by_node = [Launch(rank=r, world_size=4, local_rank=r % 2, local_size=2) for r in range(4)]
    for launch in by_node:
        check_layout(config, launch)
    dealt_out = [Launch(rank=r, world_size=4, local_rank=r // 2, local_size=2) for r in range(4)]
    for launch in dealt_out[1:3]:
        with pytest.raises(UserError, match="srun --distribution=block"):
            check_layout(config, launch)


@pytest.mark.parametrize(
    ("global_batch", "micro_batch", "world_size"), [(256, 8, 3), (4, 8, 1), (100, 7, 5), (1, 2, 9)]
)
def test_the_suggested_batch_fits(global_batch, micro_batch, world_size):
    config = layout(global_batch=global_batch, micro_batch=micro_batch)
    with pytest.raises(UserError, match=f"training.global_batch_size {global_batch} is not a multiple") as caught:
        data_parallel_size(config, world_size)
    fits = int(re.search(r"set training.global_batch_size to (\d+)", str(caught.value)).group(1))
    assert data_parallel_size(layout(global_batch=fits, micro_batch=micro_batch), world_size) == world_size
    assert abs(fits - global_batch) <= micro_batch * world_size


@pytest.mark.parametrize(("batch", "rounds", "fits"), [(5 * 8, 2, 4 * 8), (11 * 8, 5, 10 * 8), (7 * 8, 3, 6 * 8)])
def test_micro_batches_that_make_no_rounds_are_refused(batch, rounds, fits):
    with pytest.raises(UserError) as caught:
        data_parallel_size(layout(pipeline=2, global_batch=batch), 2)
    assert str(caught.value) == (
        f"training.global_batch_size {batch} makes {batch // 8} micro-batches of each data-parallel rank, which do not "
        f"divide into the {rounds} rounds of a pipeline of 2 ranks; set training.global_batch_size to {fits}"
    )


@given(pipeline=st.integers(2, 5), count=st.integers(1, 14), passes=st.integers(1, 5), zero_bubble=st.booleans())
@settings(max_examples=40)
def test_the_rule_for_micro_batches_is_that_of_the_schedules(pipeline, count, passes, zero_bubble):
    stages = stages_on_paper(pipeline, passes)
    schedule = ScheduleInterleavedZeroBubble if zero_bubble else ScheduleInterleaved1F1B
    if fits_schedule(count, pipeline):
        assert len(schedule(stages, count, loss_fn=torch.sum).pipeline_order) == pipeline
    else:
        with pytest.raises(ValueError, match="multiple of the number of rounds"):
            schedule(stages, count, loss_fn=torch.sum)


# The resolved form ------------------------------------------------------------------------------------------------


@st.composite
def configurations(draw) -> Config:
    head_size, heads = 2 * draw(st.integers(1, 40)), draw(st.integers(1, 8))
    family = draw(st.sampled_from(["llama", "gpt_neox"]))
    model = ModelConfig(
        family=family,
        hidden_size=head_size * heads,
        num_heads=heads,
        rotary_fraction=1.0 if family == "gpt_neox" else None,
        vocab_size=draw(st.none() | st.integers(2, 10**6)),
        norm_epsilon=draw(st.floats(1e-12, 1e-3)),
        tie_embeddings=draw(st.booleans()),
    )
    ponder = PonderConfig(mode=draw(st.sampled_from(get_args(Mode))))
    ponder_training = PonderTrainingConfig(
        jacobi_iterations=draw(st.integers(0, 9) | st.lists(st.integers(0, 9), min_size=1, max_size=4)),
        gradient_passes=draw(st.none() | st.integers(1, 9)),
    )
    inference = InferenceConfig(threshold=draw(st.floats(0, 1)), router_bias=draw(st.floats(-1e3, 1e3)))
    run_dir = draw(st.text("abcXYZ019_-/.# :'\"é", min_size=1, max_size=12))
    betas = draw(st.tuples(st.floats(0, 0.999), st.floats(0, 0.999)))
    config = Config(model, ponder, ponder_training, inference, training=TrainingConfig(run_dir=run_dir))
    return replace(config, optimizer=replace(config.optimizer, betas=betas))


@settings(max_examples=15)
@given(config=configurations())
def test_resolved_form_survives_the_disk(config, tmp_path_factory):
    config = validate(resolve(config))
    assert resolve(config) == config
    path = tmp_path_factory.mktemp("run") / "config.yaml"
    path.write_text(to_yaml(config), encoding="utf-8")
    assert load_config(path) == config
    assert to_yaml(load_config(path)) == to_yaml(config)


def test_nothing_is_derived_twice(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(read(ponder__mode="fixed", model__hidden_size=96)))
    kept = read_config(["--config", str(path), "--ponder.mode", "vanilla"])
    assert kept.ponder.embedding_scale == math.sqrt(2.5 * 96)


def test_a_run_may_differ_from_its_checkpoint_in_what_no_weight_depends_on():
    ours = architecture(read_config([]))
    assert ours["ponder.latent_steps"] == 3 and ours["model.norm"] == "rms"
    free = ["--model.init_std=0.1", "--model.max_position_embeddings=4096", "--ponder.router_initial_bias=0"]
    assert architecture(read_config([*free, "--inference.threshold=0.5", "--ponder_training.prune_start=3"])) == ours
    bound = {"model.norm_epsilon": 0.01, "ponder.router_hidden_size": 8, "ponder.embedding_scale": 2.0}
    for key, value in bound.items():
        assert {
            name for name, other in architecture(read_config([f"--{key}={value}"])).items() if other != ours[name]
        } == {key}


# Shipped examples -------------------------------------------------------------------------------------------------

LLAMA = {
    "llama_125m": (768, 12, 12, 2064),
    "llama_410m": (1024, 24, 16, 2752),
    "llama_834m": (1536, 24, 24, 4128),
    "llama_1.4b": (2048, 24, 32, 5504),
    "llama_2.8b": (2048, 48, 32, 5504),
}
PYTHIA = {
    "pythia_70m": (512, 6, 8),
    "pythia_160m": (768, 12, 12),
    "pythia_410m": (1024, 24, 16),
    "pythia_1b": (2048, 16, 8),
    "pythia_1.4b": (2048, 24, 16),
    "pythia_2.8b": (2560, 32, 32),
}


def stack_size(name: str) -> int:
    """Parameters of the blocks and the final norm, worked out from the dimensions."""
    if name in LLAMA:
        hidden, layers, _, ffn = LLAMA[name]
        return layers * (4 * hidden**2 + 3 * hidden * ffn + 2 * hidden) + hidden
    hidden, layers, _ = PYTHIA[name]
    attention, mlp, norms = 4 * hidden**2 + 4 * hidden, 8 * hidden**2 + 5 * hidden, 4 * hidden
    return layers * (attention + mlp + norms) + 2 * hidden


@pytest.mark.parametrize("name", [*LLAMA, *PYTHIA])
def test_examples_have_the_size_of_their_name_in_every_mode(name):
    number, unit = re.fullmatch(r"\w+_([\d.]+)([mb])", name).groups()
    nominal = float(number) * {"m": 1e6, "b": 1e9}[unit]
    dimensions = LLAMA.get(name) or PYTHIA.get(name)
    for mode in ("vanilla", "fixed", "adaptive", "pause", "sps"):
        config = read_config(["--config", str(EXAMPLES / f"{name}.yaml"), "--ponder.mode", mode])
        assert config.ponder.mode == mode
        assert (config.model.hidden_size, config.model.num_layers, config.model.num_heads) == dimensions[:3]
        with torch.device("meta"):
            model = PonderLM(config.model, config.ponder)
        sizes = {part: sum(p.numel() for p in module.parameters()) for part, module in model.named_children()}
        assert sizes["transformer"] == stack_size(name)
        assert sizes["embedding"] == sizes["head"] == config.model.vocab_size * config.model.hidden_size
        assert sizes.get("pauses") == (3 * config.model.hidden_size if mode in ("pause", "sps") else None)
        assert sizes.get("router") == (4 * config.model.hidden_size + 4 if mode == "adaptive" else None)
        assert abs(sum(sizes.values()) / nominal - 1) < (0.11 if name in LLAMA else 0.02)


@pytest.mark.parametrize("name", [*LLAMA, *PYTHIA])
def test_examples_follow_the_reference_recipe(name):
    path = EXAMPLES / f"{name}.yaml"
    config, default = read_config(["--config", str(path)]), read_config([])
    assert replace(config.optimizer, learning_rate=default.optimizer.learning_rate) == default.optimizer
    assert (config.training.steps, config.training.precision) == (50_000, "bf16")
    assert config.data.sequence_length == config.model.max_position_embeddings == 2048
    training = config.ponder_training
    assert (config.ponder.mode, config.ponder.latent_steps, training.jacobi_iterations) == ("adaptive", 3, [2, 3])
    assert training.penalty_weight > 0
    assert training.penalty_start < training.penalty_end < config.training.steps
    assert config.training.run_dir == f"runs/{name}"
    assert not Path(config.data.path).is_absolute()
    assert set(yaml.safe_load(path.read_text())) >= {"model", "ponder", "optimizer", "training", "data", "tokenizer"}
    for world_size in (1, 8, 32):
        assert data_parallel_size(config, world_size) == world_size
