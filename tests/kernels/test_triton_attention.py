"""The Triton kernel: its arithmetic in the interpreter, its machine code by the compiler; neither needs a GPU."""

import os
import subprocess
import sys

import pytest

from tests import REPOSITORY

pytest.importorskip("triton")


@pytest.mark.parametrize(
    "what", ["quick", *(pytest.param(what, marks=pytest.mark.slow) for what in ("grid", "compiled"))]
)
def test_the_interpreter_computes_what_is_written_out(what):
    command = [sys.executable, "-m", "tests.kernels.interpreted_attention", what]
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, env=environment, check=False)
    assert done.returncode == 0, done.stderr
