"""The Triton kernel: its arithmetic in the interpreter, its machine code by the compiler; neither needs a GPU."""

import os
import subprocess
import sys

import pytest
import torch

from megatron_ponder.kernels.triton_attention import Layout, layout
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


def check_machine_code(kernel, head_size, capability, dtype, group=1):
    from benchmarks.triton_kernels import LARGEST_SHARED, compiled

    found = compiled(kernel, head_size, dtype, capability, group=group)
    assert found.spilled == 0, found
    assert found.shared <= LARGEST_SHARED[capability], found


def test_no_register_spills_where_most_are_needed():
    check_machine_code("backward_keys", 64, 90, torch.bfloat16)


@pytest.mark.slow
@pytest.mark.parametrize("kernel", Layout._fields)
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(
    ("head_size", "dtype", "group"),
    [(64, torch.bfloat16, 1), (128, torch.bfloat16, 1), (80, torch.bfloat16, 4), (64, torch.float32, 1)],
)
def test_no_register_spills(kernel, capability, head_size, dtype, group):
    check_machine_code(kernel, head_size, capability, dtype, group)


@pytest.mark.slow
@pytest.mark.parametrize("kernel", Layout._fields)
@pytest.mark.parametrize(("head_size", "group"), [(128, 1), (80, 4)])
def test_wide_heads_in_fp32_fit_though_they_spill(kernel, head_size, group):
    from benchmarks.triton_kernels import LARGEST_SHARED, compiled

    assert compiled(kernel, head_size, torch.float32, 80, group=group).shared <= LARGEST_SHARED[80]


def test_every_head_size_has_blocks():
    for head_size in (8, 64, 72, 96, 128):
        for dtype in (torch.bfloat16, torch.float32):
            for capability in (80, 89, 90, 100):
                for blocks in layout(head_size, dtype, capability):
                    assert blocks.queries % 16 == blocks.keys % 16 == 0


def test_gpus_with_little_shared_memory_have_the_blocks_that_are_compiled_for_it():
    for head_size in (64, 80, 128):
        small = layout(head_size, torch.bfloat16, 80)
        assert all(layout(head_size, torch.bfloat16, capability) == small for capability in (86, 89, 120))
