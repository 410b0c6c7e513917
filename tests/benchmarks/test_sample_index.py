"""The benchmark of the sample index reads what it writes, and runs beside megatron-core where that is installed."""

import importlib.util
import os
import subprocess
import sys

import numpy as np
import pytest

from benchmarks.sample_index import measure, write_dataset
from megatron_ponder.data.indexed_dataset import IndexedDataset
from tests import REPOSITORY


def test_what_it_writes_is_a_dataset_of_about_that_size(tmp_path):
    write_dataset(tmp_path / "data", documents=2000, tokens=100_000)
    dataset = IndexedDataset(tmp_path / "data")
    assert dataset.num_documents == len(dataset.document_lengths) == 2000
    assert 90_000 < dataset.num_tokens < 115_000


def test_growth_of_memory_is_seen_at_its_peak():
    def build():
        np.ones(40_000_000, np.uint8).sum()
        return np.ones(1000)

    seconds, size, result = measure(build)
    assert seconds > 0 and result.sum() == 1000
    assert 35e6 < size < 60e6


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("megatron") is None, reason="megatron-core is not installed")
def test_it_runs():
    command = [sys.executable, str(REPOSITORY / "benchmarks" / "sample_index.py"), "--documents", "5000"]
    command += ["--tokens", "1000000", "--sequence-length", "64", "--rounds", "1"]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert "samples, random access" in result.stdout
