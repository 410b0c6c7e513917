"""A real text, the sources of Python's standard library, and a tokenizer trained on it."""

import sysconfig
from pathlib import Path

import pytest

from megatron_ponder.data.tokenizer_training import train_tokenizer


@pytest.fixture(scope="session")
def sources() -> list[Path]:
    """About 1 MB."""
    return sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[:40]


@pytest.fixture(scope="session")
def sentencepiece_model(sources, tmp_path_factory) -> Path:
    return train_tokenizer(sources, tmp_path_factory.mktemp("tokenizer") / "tokenizer", vocab_size=1024).path
