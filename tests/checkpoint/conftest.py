"""Checkpoints that several files look at."""

from pathlib import Path

import pytest

from megatron_ponder.checkpoint.folders import (
    checkpoint_name,
)
from megatron_ponder.checkpoint.writer import write_weights_checkpoint
from tests.checkpoint.saved import TOKENIZER_FILES, WEIGHTS
from tests.models import small_config


@pytest.fixture
def tokenizer(tmp_path) -> Path:
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    for name, text in {**TOKENIZER_FILES, "notes.txt": "not part of it"}.items():
        (folder / name).write_text(text)
    return folder


@pytest.fixture
def checkpoint(tmp_path, tokenizer) -> Path:
    """One complete checkpoint of a run."""
    folder = tmp_path / "run" / "checkpoints" / checkpoint_name(0)
    write_weights_checkpoint(folder, WEIGHTS, small_config(), tokenizer)
    return folder
