"""Compiling at the start of a run: what a machine needs for it, what it cannot be combined with, what is said of it."""

import pytest
import torch

from megatron_ponder.base.errors import UserError
from megatron_ponder.training.compiling import compile_blocks, most_graphs
from tests.models import small_config, small_model


def test_without_a_compiler_one_line_says_what_to_install(monkeypatch, tmp_path):
    torch.compiler.reset()  # a function that is already compiled needs no compiler
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    model, config = small_model(), small_config(training__compile="true")
    with pytest.raises(UserError) as error:
        compile_blocks(model, config, torch.device("cpu"))
    line = str(error.value)
    assert "\n" not in line
    assert line.startswith("training.compile needs a C++ compiler and Python's headers (on Debian and Ubuntu, apt-get")
    assert line.endswith("; install them, or set training.compile to false")
    assert model.transformer.compiled is None


def test_nothing_is_compiled_unless_it_is_wanted():
    model = small_model()
    compile_blocks(model, small_config(), torch.device("cpu"))
    assert model.transformer.compiled is None


@pytest.mark.parametrize(
    ("overrides", "most"),
    [
        ({"ponder__mode": "vanilla"}, 1),
        # 1, 2 and 3 slots; of 3, those that the next pass reads
        ({"ponder__mode": "adaptive", "ponder_training__jacobi_iterations": "[2,3]"}, 4),
        # of 3 also the last alone, which is the output
        ({"ponder__mode": "fixed", "ponder_training__jacobi_iterations": "[2,3]"}, 5),
        # each in passes with attention computed again, and in those without
        ({"ponder__mode": "fixed", "training__recompute": "attention", "training__recompute_passes": 3}, 7),
        ({"ponder__mode": "fixed", "ponder__latent_steps": 12}, 15),
    ],
)
def test_graphs_that_there_may_be(overrides, most):
    config = small_config(**overrides)
    values = {key: value for key, value in overrides.items() if not key.startswith("training")}
    model = small_model(**values)
    model.recompute = type(model.recompute)(config.training.recompute, config.training.recompute_passes)
    assert most_graphs(model, config) == 2 * most


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"parallel__zero_stage": 3}, "training.compile cannot be used with parallel.zero_stage 3"),
        (
            {"parallel__pipeline": 2, "parallel__pipeline_schedule": "zero_bubble", "training__precision": "fp32"},
            "training.compile computes all gradients of a block at once",
        ),
    ],
)
def test_what_cannot_be_combined(overrides, message):
    small_config(**overrides)
    with pytest.raises(UserError, match=message):
        small_config(**overrides, training__compile="true")
