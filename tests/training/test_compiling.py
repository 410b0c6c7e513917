"""Compiling at the start of a run: what a machine needs for it, what it cannot be combined with, what is said of it."""

import re
from collections.abc import Sequence
from functools import partial
from unittest import mock

import pytest
import torch

from megatron_ponder.base.errors import UserError
from megatron_ponder.parallel.mesh import Mesh
from megatron_ponder.runs.metrics import read_metrics
from megatron_ponder.training import trainer
from megatron_ponder.training.compiling import PACKED_GRAPHS, compile_blocks, most_graphs
from tests.distributed import run_distributed
from tests.finished_runs import tiny_arguments, train_in_turn
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
        # tokens alone, and each of three slots that are run once; in a pipeline of 1, 2, 3 and the last
        ({"ponder__mode": "fixed", "ponder__latent_visibility": "own"}, 4),
        ({"ponder__mode": "fixed", "ponder__latent_visibility": "own", "parallel__pipeline": 2}, 4),
        ({"ponder__latent_visibility": "own", "ponder_training__prune_start": 9}, 4 + 2 * PACKED_GRAPHS),
        # and packed ones, but not where they are masked
        ({"ponder__mode": "adaptive", "ponder_training__prune_start": 9}, 4 + PACKED_GRAPHS),
        (
            {"ponder__mode": "adaptive", "ponder_training__prune_start": 9, "ponder_training__packed": "false"},
            4,
        ),
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
        (
            {"parallel__context": 2, "ponder_training__prune_start": 3},
            r"training.compile cannot compile packed passes of parallel.context ranks, .* ponder_training.packed to",
        ),
    ],
)
def test_what_cannot_be_combined(overrides, message):
    small_config(**overrides)
    with pytest.raises(UserError, match=message):
        small_config(**overrides, training__compile="true")


@pytest.mark.slow  # C++ that takes long to compile
def test_a_run_compiles_in_its_first_step_says_so_and_learns_the_same(corpus, tmp_path):
    values = {"training__steps": 3, "ponder_training__jacobi_iterations": "[2,3]"}
    runs = {name: tmp_path / name for name in ("true", "false")}
    commands = [tiny_arguments(corpus, run, **values, training__compile=name) for name, run in runs.items()]
    run_distributed(train_in_turn, 1, commands, time_limit=1000)
    log = (runs["true"] / "train.log").read_text()
    assert re.findall(r"step (\d+)  (\d+) graphs of blocks compiled in \d+\.\d s", log) == [("1", "4")]
    compiled, eager = (read_metrics(run) for run in runs.values())
    for name in ("loss", "grad_norm", "validation_loss"):
        pairs = [(a[name], b[name]) for a, b in zip(compiled, eager, strict=True) if name in b]
        assert pairs and all(a == pytest.approx(b, rel=1e-4) for a, b in pairs)


def train_without_inductor(mesh: Mesh, commands: Sequence[Sequence[str]]) -> None:
    """As `train_in_turn`; graphs are made in seconds, and run as PyTorch's operations."""
    with mock.patch.object(trainer, "compile_blocks", partial(compile_blocks, backend="aot_eager")):
        train_in_turn(mesh, commands)


@pytest.mark.slow
def test_a_run_through_all_phases_compiles_in_the_first_step_of_each_and_learns_the_same(corpus, tmp_path):
    starts = {"latent_start": 1, "router_start": 2, "prune_start": 3}
    values = {f"ponder_training__{name}": step for name, step in starts.items()}
    values |= {"training__steps": 7, "ponder_training__jacobi_iterations": "[1,2]", "inference__threshold": 0.2}
    values |= {"logging__own_losses_interval": 0}  # which wants states of all slots
    runs = {name: tmp_path / name for name in ("true", "false")}
    commands = [tiny_arguments(corpus, run, **values, training__compile=name) for name, run in runs.items()]
    run_distributed(train_without_inductor, 1, commands, time_limit=1000)
    log = (runs["true"] / "train.log").read_text()
    # one slot a token; two and three, of which those are cut that nobody reads; packed
    assert re.findall(r"step (\d+)  (\d+) graphs of blocks", log) == [("1", "1"), ("2", "4"), ("4", "7")]
    compiled, eager = (read_metrics(run) for run in runs.values())
    for name in ("loss", "grad_norm", "model_flops", "validation_loss"):
        pairs = [(a[name], b[name]) for a, b in zip(compiled, eager, strict=True) if name in b]
        assert pairs and all(a == pytest.approx(b, rel=1e-4) for a, b in pairs), name
