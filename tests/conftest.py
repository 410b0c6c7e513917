"""Fixtures that more than one folder of tests needs."""

import atexit
import gc
import os
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from hypothesis import settings

from megatron_ponder.commands.ponder import main
from megatron_ponder.data.preprocessing import preprocess
from megatron_ponder.data.tokenizer_training import train_tokenizer
from tests import REPOSITORY

os.environ.setdefault("DS_ACCELERATOR", "cpu")
# `make test-all` asks for the other.
settings.register_profile("quick", max_examples=30, deadline=None)  # a busy machine is no fault
settings.register_profile("thorough", max_examples=100, deadline=None)
settings.load_profile("quick")


def pytest_collection_finish() -> None:
    """Hide what is imported from the garbage collector, which takes half a second for it, and runs often."""
    gc.collect()
    gc.freeze()
    atexit.register(gc.unfreeze)  # lest libraries report leaks


@pytest.fixture(autouse=True)
def no_group_left():
    """A process group that a test leaves behind is that test's failure, not the next one's."""
    yield
    if dist.is_initialized():
        dist.destroy_process_group()
        pytest.fail("a process group was left behind")


@pytest.fixture(autouse=True)
def plain_processor():
    """Several tests and ranks share the cores; small tensors gain nothing from more threads.

    Denormal numbers are what they are, whatever a test before has asked for: Hypothesis refuses to draw without them.
    """
    torch.set_num_threads(1)
    torch.set_flush_denormal(False)


class Ended(NamedTuple):
    """How a command has ended: its exit code, what it printed, and its errors."""

    code: int
    out: str
    err: str


@pytest.fixture
def ponder(monkeypatch, capsys) -> Iterator[Callable[..., Ended]]:
    """Runs `ponder` with the words of a command line in this process, where PyTorch is imported already."""
    monkeypatch.setenv("COLUMNS", "400")  # no path is cut
    monkeypatch.chdir(REPOSITORY)

    def ponder(*words: object) -> Ended:
        capsys.readouterr()
        code = 0
        try:
            main([*map(str, words)])
        except SystemExit as stop:
            code = stop.code
        return Ended(code, *capsys.readouterr())

    yield ponder
    torch.set_flush_denormal(False)  # which commands that compute set


@dataclass(frozen=True)
class Corpus:
    """A small real dataset: sources of Python's standard library.

    Attributes:
        tokenizer: SentencePiece model.
        dataset: prefix of the indexed dataset.
        text: one of the files.
    """

    tokenizer: Path
    dataset: Path
    text: Path


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Corpus:
    """About 400 KB in 30 documents, 512 tokens."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    files = [path for path in files if 5_000 < path.stat().st_size < 25_000][:30]
    folder = tmp_path_factory.mktemp("corpus")
    tokenizer = train_tokenizer(files, folder / "tokenizer", vocab_size=512).path
    report = preprocess(files, folder / "stdlib", tokenizer, workers=1)
    return Corpus(Path(tokenizer), Path(report.prefix), files[0])


@pytest.fixture
def run_arguments(corpus, tmp_path) -> list[str]:
    """A command line that trains a tiny adaptive model for 40 steps in `tmp_path/run`; append overrides."""
    values = {
        "model.hidden_size": 16,
        "model.num_layers": 2,
        "model.num_heads": 2,
        "model.ffn_hidden_size": 32,
        "ponder.latent_steps": 2,
        "ponder_training.penalty_weight": 0.01,
        "ponder_training.penalty_end": 10,
        "data.path": corpus.dataset,
        "data.split": "90,10,0",
        "data.sequence_length": 16,
        "data.num_workers": 0,
        "tokenizer.path": corpus.tokenizer,
        "optimizer.learning_rate": 1e-2,
        "training.run_dir": tmp_path / "run",
        "training.steps": 40,
        "training.global_batch_size": 4,
        "training.micro_batch_size": 2,
        "training.precision": "fp32",
        "training.eval_interval": 20,
        "training.eval_samples": 6,
        "checkpoint.interval": 10,
    }
    return [f"--{key}={value}" for key, value in values.items()]
