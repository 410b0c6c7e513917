"""Run folders and checkpoints that an earlier version wrote go on as they would have gone on under it.

Up to rounding in fp32: attention within documents adds up in another order since, and pruned passes run fewer slots.

`before/` was written by version 0.1.0: `run`, killed after its third step of four; `whole`, what became of the same
command when nothing stopped it; and `gpt_neox`, a checkpoint with logits computed from it.
"""

import os
import shutil
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from megatron_ponder.checkpoint.folders import resolve_checkpoint
from megatron_ponder.checkpoint.load import load_model
from megatron_ponder.checkpoint.optimizer_state import KINDS
from megatron_ponder.checkpoint.reader import open_tensors
from megatron_ponder.parallel.mesh import Mesh
from megatron_ponder.runs.metrics import read_metrics
from megatron_ponder.training.step_watch import MEASURED
from tests.distributed import run_distributed
from tests.finished_runs import train_in_turn

BEFORE = Path(__file__).parent / "before"
# Sums in the same order on every x86 processor, whatever instructions it has; read when PyTorch is imported.
REPRODUCIBLE = {"ATEN_CPU_CAPABILITY": "default", "MKL_CBWR": "COMPATIBLE"}


class Today(NamedTuple):
    """What became of them: the folder that they were copied to, and the logits of the checkpoint."""

    folder: Path
    logits: Tensor


def go_on(mesh: Mesh, folder: Path, commands: list[list[str]]) -> Tensor:
    """Train by every command in a folder, then compute the logits of its checkpoint; for `run_distributed`."""
    os.chdir(folder)
    train_in_turn(mesh, commands)
    model = load_model(Path("gpt_neox")).model
    with torch.no_grad():
        tokens = load_file("gpt_neox.safetensors")["tokens"]
        return model.head(model.jacobi(tokens, 1, model.rule("hard")).output_BLH)


@pytest.fixture(scope="module")
def today(tmp_path_factory) -> Today:
    folder = Path(shutil.copytree(BEFORE, tmp_path_factory.mktemp("before") / "copy"))
    words = (folder / "command.txt").read_text().split()
    commands = [["--config=run/config.yaml", "--checkpoint.resume=auto"], [*words, "--training.run_dir=anew"]]
    with pytest.MonkeyPatch.context() as patch:
        for name, value in REPRODUCIBLE.items():
            patch.setenv(name, value)
        return Today(folder, *run_distributed(go_on, 1, folder, commands, fresh=True))


def assert_same(got: Tensor, expected: Tensor) -> None:
    """As near as fp32 is; the tolerance is well below what a wrong step would change."""
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["run", "anew"])
def test_the_end_is_that_of_the_run_that_nothing_stopped(today, name):
    expected = load_file(BEFORE / "whole" / "step-4.safetensors")
    with open_tensors(resolve_checkpoint(today.folder / name)) as tensors:
        got = {f"{kind}/{key}": tensors.get(kind, key) for kind in KINDS for key in tensors.names(kind)}
    assert got.keys() == expected.keys()
    for key, tensor in expected.items():
        assert_same(got[key], tensor)


@pytest.mark.parametrize("name", ["run", "anew"])
def test_every_step_has_the_same_numbers(today, name):
    expected, got = read_metrics(BEFORE / "whole"), read_metrics(today.folder / name)
    assert [record["step"] for record in got] == [1, 2, 3, 4]
    for before, after in zip(expected, got, strict=True):
        assert after["model_flops"] <= before["model_flops"]  # slots that are pruned are not run any more
        for key in before.keys() - MEASURED - {"model_flops"}:
            want = before[key] if before[key] is None else pytest.approx(before[key], rel=5e-5)
            assert after[key] == want, key


def test_the_log_and_the_starts_are_added_to(today):
    for file in ("train.log", "starts.jsonl"):
        before, after = ((folder / "run" / file).read_text() for folder in (BEFORE, today.folder))
        assert after.startswith(before)
        assert len(after) > len(before)


def test_a_checkpoint_computes_the_same_logits(today):
    assert_same(today.logits, load_file(BEFORE / "gpt_neox.safetensors")["logits"])
