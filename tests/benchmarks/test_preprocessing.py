"""The benchmark runs at a small size; what it measures is not a matter for tests."""

import subprocess
import sys

import pytest

from tests import REPOSITORY


@pytest.mark.slow
def test_it_measures():
    command = [sys.executable, REPOSITORY / "benchmarks" / "preprocessing.py", "--megabytes", "1", "--memory", "1"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "preprocess: " in done.stdout
    assert "inside the tokenizer: " in done.stdout
    assert "peak memory with 1 MB: " in done.stdout
    assert "DIFFERENT" not in done.stdout
