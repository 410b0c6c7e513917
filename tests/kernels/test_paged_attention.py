"""Attention over blocks of a pool: the kernels in the interpreter, and the twins beside attention written out."""

import itertools
import os
import subprocess
import sys

import pytest
import torch

from megatron_ponder.kernels.attention import DEAD
from megatron_ponder.kernels.decoding import StoredBlocks, attend_owned, for_heads
from megatron_ponder.kernels.paged_attention import Pages, gathered
from tests import REPOSITORY


@pytest.mark.parametrize("what", ["quick", pytest.param("grid", marks=pytest.mark.slow)])
def test_the_interpreter_computes_what_the_twin_does(what):
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "tests.kernels.interpreted_pages", what]
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, env=environment, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("sequences", [1, 3])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 2e-2)], ids=str
)
def test_blocks_as_they_lie_and_by_tables_are_the_same_keys(sequences, dtype, tolerance):
    """Of narrow types, more blocks than are converted at a time; w from 1 to 1e-30, and dead keys."""
    torch.manual_seed(0)
    heads, group, size, per_row = 4, 2, 16, 60
    owners = torch.arange(sequences).repeat(per_row)[torch.randperm(sequences * per_row)]
    keys, values = (torch.randn(len(owners), heads, 32, size).to(dtype) for _ in "kv")
    log_w = -69 * torch.rand(len(owners), 32, dtype=torch.promote_types(dtype, torch.float32)) ** 3
    log_w[torch.rand(log_w.shape) < 0.1] = DEAD
    q = torch.randn(sequences, heads * group, size).to(dtype)
    owned = attend_owned(q, StoredBlocks(keys, values, for_heads(log_w, heads)), owners, size**-0.5)
    table = torch.stack([(owners == row).nonzero().squeeze(1) for row in range(sequences)])
    lengths = torch.full((sequences,), 32 * per_row)
    paged = gathered(q, Pages(keys, values, log_w, table, torch.arange(sequences), lengths), size**-0.5)
    for row in range(sequences):
        k, v = (
            x[table[row]].double().transpose(0, 1).flatten(1, 2).repeat_interleave(group, 0) for x in (keys, values)
        )
        logits = torch.einsum("nd,nsd->ns", q[row].double(), k) * size**-0.5 + log_w[table[row]].double().flatten()
        expected = torch.einsum("ns,nsd->nd", logits.softmax(-1), v)
        for got in (owned, paged):
            assert (got[row].double() - expected).abs().max() < tolerance


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(
    ("head_size", "group", "dtype", "splits"),
    [
        (64, 1, torch.bfloat16, 16),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in itertools.product((64, 80, 128), (1, 8), (torch.bfloat16, torch.float32), (1, 64))
        ),
    ],
)
def test_compiled_kernels_spill_nothing(head_size, group, dtype, splits, capability):
    pytest.importorskip("triton")
    from benchmarks.decoding_kernels import of_decoding
    from benchmarks.triton_kernels import LARGEST_SHARED

    for taken in of_decoding(head_size, group, dtype, splits, capability).values():
        assert taken.spilled == 0
        assert taken.registers < 255
        assert taken.shared <= LARGEST_SHARED[capability]
