"""Words of the command line: what shows something in place of a run, and what is meant by other programs' names."""

import re

import pytest
import yaml

import megatron_ponder
from megatron_ponder.base.durations import parse_duration
from megatron_ponder.base.errors import UserError
from megatron_ponder.config import read_config, to_yaml
from megatron_ponder.config.other_names import NAMES, VALUES, nearest_key
from megatron_ponder.config.parsing import KEYS
from tests import REPOSITORY


def shown(capsys, *arguments: str) -> str:
    """What is printed in place of a run."""
    with pytest.raises(SystemExit) as caught:
        read_config(arguments)
    assert caught.value.code == 0
    return capsys.readouterr().out


def refusal(*arguments: str) -> str:
    with pytest.raises(UserError) as caught:
        read_config(arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("position", [0, 2])
def test_the_configuration_is_shown_and_can_be_read_again(capsys, tmp_path, position):
    given = ["--model.hidden_size", "96", "--data.path", "[0.3, a, 0.7, b]"]
    text = shown(capsys, *given[:position], "--print_config", *given[position:])
    (tmp_path / "config.yaml").write_text(text)
    assert read_config(["--config", str(tmp_path / "config.yaml")]) == read_config(given)
    assert text == to_yaml(read_config(given))


def test_a_configuration_that_cannot_be_is_not_shown():
    assert refusal("--print_config", "--model.num_layers", "0").startswith("model.num_layers is 0")


def test_help_has_nothing_that_is_refused(capsys):
    text = shown(capsys, "--help")
    options = set(re.findall(r"^  (?:-h, )?(--[\w.]+)", text, re.MULTILINE))
    assert options == {"--help", "--version", "--config", "--print_config", *(f"--{key}" for key in KEYS)}
    assert shown(capsys, "-h") == text


def test_the_version_is_declared_once(capsys):
    assert shown(capsys, "--version").split()[-1] == megatron_ponder.__version__
    assert megatron_ponder.__version__ not in (REPOSITORY / "setup.py").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("given", "key"),
    [
        ("training.lr", "optimizer.learning_rate"),
        ("lr", "optimizer.learning_rate"),
        ("min-lr", "optimizer.min_learning_rate"),
        ("tensor-model-parallel-size", "parallel.tensor"),
        ("pipeline_model_parallel_size", "parallel.pipeline"),
        ("num-attention-heads", "model.num_heads"),
        ("num-query-groups", "model.num_kv_heads"),
        ("model.num_hidden_layers", "model.num_layers"),
        ("seq-length", "data.sequence_length"),
        ("micro-batch-size", "training.micro_batch_size"),
        ("train_micro_batch_size_per_gpu", "training.micro_batch_size"),
        ("per_device_train_batch_size", "training.micro_batch_size"),
        ("train-iters", "training.steps"),
        ("save", "training.run_dir"),
        ("save-interval", "checkpoint.interval"),
        ("load", "checkpoint.resume"),
        ("max_grad_norm", "optimizer.gradient_clipping"),
        ("adam-beta1", "optimizer.betas"),
        ("output_dir", "training.run_dir"),
        ("zero_optimization.stage", "parallel.zero_stage"),
        ("bf16", "training.precision"),
        ("gradient_checkpointing", "training.recompute"),
        ("use-distributed-optimizer", "parallel.zero_stage"),
        ("train_batch_sizes", "training.global_batch_size"),
        ("model.hiden_size", "model.hidden_size"),
        ("optimizer.seed", "training.seed"),
    ],
)
def test_a_key_is_found_by_what_it_means(given, key):
    assert f"unknown configuration key {given} on the command line; did you mean {key}?" in refusal(f"--{given}=1")


def test_names_of_other_programs_mean_one_key_each():
    names = [name for names in NAMES.values() for name in names]
    assert len(names) == len(set(names)) > 200
    assert set(NAMES) <= set(KEYS)
    assert all(nearest_key(name, KEYS) == key for key, names in NAMES.items() for name in names)
    assert not any(key.rpartition(".")[2] in names for key in KEYS)
    assert all(f"--{key}" and key in KEYS for key in VALUES)


def test_a_section_of_another_program(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("num_hidden_layers: 3\n")
    assert "unknown configuration section num_hidden_layers" in refusal("--config", str(path))
    assert refusal("--config", str(path)).endswith("put `num_layers` below `model:`")


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("training.precision", "fp16", "fp16 needs a scaled loss, which is not offered; bf16 has the range of fp32"),
        ("training.precision", "bfloat16", "write bf16"),
        ("training.precision", "double", "training.precision is double; write one of bf16, fp32"),
        ("model.family", "gpt2", "pythia models are of the family gpt_neox"),
        ("training.seed", "-1", "training.seed is -1; its range is 0 to 9,223,372,036,854,775,807"),
        ("training.seed", "9" * 5000, "training.seed is a number of 5,000 digits; its range is"),
        ("optimizer.learning_rate", "9" * 400, "optimizer.learning_rate is a number of 400 digits; its range is"),
        ("parallel.tensor", "9223372036854775807", "parallel.tensor is 9,223,372,036,854,775,807; its range is 1 to 4"),
        ("model.num_layers", "null", "model.num_layers is null; write a whole number"),
        ("parallel.pipeline_layers", "[1, x]", "write a list of whole numbers, or null"),
        ("optimizer.betas", "[0.9]", "optimizer.betas is [0.9]; write a list of 2 numbers"),
        ("logging.tensorboard", "maybe", "logging.tensorboard is maybe; write true or false"),
        ("training.time_limit", "tomorrow", "write minutes or H:MM:SS, such as 90 or '1:30:00'"),
        ("training.time_limit", "0", "training.time_limit is 0; its range is 1 to 1,000,000 minutes"),
        ("training.time_limit", f"{'9' * 5000}:00:00", "write minutes or H:MM:SS"),
    ],
)
def test_values_are_refused_in_our_words(key, value, said):
    assert said in refusal(f"--{key}", value)


def test_text_that_looks_like_a_number(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("logging:\n  wandb_project: 2026\n")
    said = refusal("--config", str(path))
    assert said == "logging.wandb_project is 2026; write text, or null; put it in quotes"


@pytest.mark.parametrize(
    ("text", "seconds"), [("90", 5400), ("1:30:00", 5400), ("'1:30:00'", 5400), ("'90'", 5400), ("1-00:00:00", 86400)]
)
def test_time_limits_as_people_write_them(tmp_path, text, seconds):
    path = tmp_path / "config.yaml"
    path.write_text(f"training:\n  time_limit: {text}\n")
    config = read_config(["--config", str(path)])
    assert parse_duration(config.training.time_limit) == seconds
    path.write_text(to_yaml(config))
    assert read_config(["--config", str(path)]) == config
    assert yaml.safe_load(to_yaml(config))
