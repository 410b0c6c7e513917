"""Real training runs inside tests: tiny models on real text, trained by the function that the command calls."""

import functools
import re
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import pytest
import torch

from megatron_ponder.base.errors import UserError
from megatron_ponder.base.launch import Launch
from megatron_ponder.config import read_config
from megatron_ponder.data.preprocessing import preprocess
from megatron_ponder.hf.starting_point import complete
from megatron_ponder.parallel.mesh import Mesh
from megatron_ponder.parallel.process_group import process_group
from megatron_ponder.runs import run_output
from megatron_ponder.training.trainer import train
from tests.distributed import run_distributed
from tests.processes import free_port

STEPS = 8
LATEST = "step-00000008"


def tiny_arguments(corpus, run_dir: Path, **overrides) -> list[str]:
    """A command line that trains a tiny adaptive model in `run_dir`; overrides are written `training__steps=4`."""
    values = {
        "model.hidden_size": 16,
        "model.num_layers": 2,
        "model.num_heads": 2,
        "model.ffn_hidden_size": 32,
        "model.max_position_embeddings": 256,
        "ponder.latent_steps": 2,
        "inference.threshold": 0.1,
        "data.path": corpus.dataset,
        "data.split": "90,10,0",
        "data.sequence_length": 16,
        "data.num_workers": 0,
        "tokenizer.path": corpus.tokenizer,
        "optimizer.learning_rate": 1e-2,
        "training.run_dir": run_dir,
        "training.steps": STEPS,
        "training.global_batch_size": 4,
        "training.micro_batch_size": 2,
        "training.precision": "fp32",
        "training.eval_interval": 4,
        "training.eval_samples": 6,
        "checkpoint.interval": 4,
        "logging.own_losses_interval": 1,
        "logging.tensorboard": "false",
    } | {key.replace("__", "."): value for key, value in overrides.items()}
    return [f"--{key}={value}" for key, value in values.items()]


def undrawn() -> mock._patch:
    """Runs without a picture at their end, which takes a third of a tiny run's time."""
    return mock.patch.object(run_output, "plot_training", lambda folder: folder / "training.png")


def train_in_turn(mesh: Mesh, commands: Sequence[Sequence[str]]) -> None:
    """Train by each command line; for `run_distributed`."""
    with undrawn():
        for command in commands:
            train(read_config(complete(command)), mesh.device)


@dataclass(frozen=True)
class FinishedRuns:
    """Run folders.

    Attributes:
        whole: 8 steps, with checkpoints at 4 and 8.
        anew: 2 steps from the weights of `whole`, with another seed.
        moved: `whole` resumed at step 4 with other data.
        other_dataset: those data, made with the same tokenizer.
    """

    whole: Path
    anew: Path
    moved: Path
    other_dataset: Path


@functools.cache
def finished_runs(corpus) -> FinishedRuns:
    """Runs that several files of tests look at, made once, in one process, because importing DeepSpeed takes seconds.

    A process of its own, because DeepSpeed never forgets the ranks that it has seen.
    """
    folder = corpus.dataset.parent / "runs"
    files = sorted(corpus.text.parent.glob("*.py"))[:30]
    other = preprocess(files, folder / "other", corpus.tokenizer).prefix
    runs = FinishedRuns(folder / "whole", folder / "anew", folder / "moved", other)
    commands = [
        tiny_arguments(corpus, runs.whole),
        tiny_arguments(corpus, runs.anew, training__steps=2, checkpoint__initialize_from=runs.whole, training__seed=7),
        tiny_arguments(
            corpus,
            runs.moved,
            data__path=other,
            checkpoint__resume=runs.whole / "checkpoints" / "step-00000004",
            checkpoint__allow_data_change="true",
        ),
    ]
    run_distributed(train_in_turn, 1, commands, time_limit=300)
    return runs


@contextmanager
def alone() -> Iterator[torch.device]:
    """A process group of this process alone, which leaves no trace."""
    try:
        with process_group(Launch(port=free_port())) as device:
            yield device
    finally:
        torch.set_flush_denormal(False)


def refused(arguments: Sequence[str]) -> str:
    """The one line with which training by a command line is refused, in this process."""
    with pytest.raises(UserError) as caught, alone() as device:
        train(read_config(arguments), device)
    message = str(caught.value)
    assert message
    assert "\n" not in message
    return message


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder with its bytes."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def catches(pid: int, number: signal.Signals) -> bool:
    """Whether a process has a handler for a signal."""
    status = Path(f"/proc/{pid}/status").read_text()
    return bool(int(re.search(r"SigCgt:\s*(\w+)", status).group(1), 16) >> (number - 1) & 1)
