"""A real corpus, the sources of Python's standard library, and a tokenizer trained on it."""

import sysconfig
from pathlib import Path

import pytest

from megatron_ponder.data.tokenizer_training import train_tokenizer


@pytest.fixture(scope="session")
def source_files() -> list[Path]:
    """About 1 MB."""
    return sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[:40]


@pytest.fixture(scope="session")
def tokenizer_path(source_files, tmp_path_factory) -> Path:
    return train_tokenizer(source_files, tmp_path_factory.mktemp("tokenizer") / "tokenizer", vocab_size=2048).path
