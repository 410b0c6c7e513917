"""The benchmark of failures runs; what it measures is not a matter for tests."""

import os
import re
import subprocess
import sys

import pytest

from tests import REPOSITORY
from tests.processes import SMALL


@pytest.mark.slow
@pytest.mark.parametrize(
    ("part", "said"),
    [
        ("end", r"SIGKILL .* s"),
        ("restart", r"steps lost"),
        ("step", r"a step of [\d.]+ ms; what is done in it for failures: \d+ µs, [\d.]+ %"),
    ],
)
def test_a_part_measures(part, said):
    command = [sys.executable, str(REPOSITORY / "benchmarks" / "resilience.py"), "--part", part, "--repeats", "1"]
    done = subprocess.run(command, env=os.environ | SMALL, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert re.search(said, done.stdout), done.stdout
