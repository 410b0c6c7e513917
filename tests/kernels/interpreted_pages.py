"""The kernels of paged attention in Triton's interpreter, beside their twin in fp64, in a process of its own.

TRITON_INTERPRET=1 python -m tests.kernels.interpreted_pages quick|grid
"""

import itertools
import sys

import torch

from megatron_ponder.kernels.attention import DEAD
from megatron_ponder.kernels.paged_attention import Pages, gathered, in_triton

BLOCK = 32


def pages_of(heads: int, head_size: int, lengths: list[int], generator: torch.Generator) -> Pages:
    """Blocks in any order, keys of weights from 1 to 1e-30 and of none, and no numbers where nothing was written."""
    width, count = max(lengths) // BLOCK + 2, len(lengths)
    blocks = torch.randperm(count * width, generator=generator)
    keys, values = (torch.randn(len(blocks), heads, BLOCK, head_size, generator=generator) for _ in "kv")
    log_w = -69 * torch.rand(len(blocks), BLOCK, generator=generator) ** 3
    log_w[torch.rand(log_w.shape, generator=generator) < 0.2] = DEAD
    tables = blocks.view(count, width)
    for row, length in enumerate(lengths):
        last, place = tables[row, (length - 1) // BLOCK], (length - 1) % BLOCK
        log_w[last, place] = 0  # a query sees itself
        for x in (keys[last].transpose(0, 1), values[last].transpose(0, 1), log_w[last]):
            x[place + 1 :] = torch.nan
    rows = torch.randperm(count, generator=generator)
    return Pages(keys, values, log_w, tables, rows, torch.tensor(lengths)[rows])


def compare(heads: int, group: int, head_size: int, lengths: list[int], splits: int) -> None:
    """One case."""
    generator = torch.Generator().manual_seed(heads * group + splits)
    pages = pages_of(heads, head_size, lengths, generator)
    q_TND = torch.randn(len(lengths), heads * group, head_size, generator=generator)
    scale = head_size**-0.5
    wide = Pages(*(x.double() if x.is_floating_point() else x for x in pages))
    expected = gathered(q_TND.double(), wide, scale)
    for got in (in_triton(q_TND, pages, scale, splits), gathered(q_TND, pages, scale)):
        torch.testing.assert_close(got.double(), expected, atol=2e-6, rtol=1e-5)


if __name__ == "__main__":
    if sys.argv[1] == "quick":
        compare(1, 2, 24, [1, 70], 1)
        compare(2, 1, 64, [33], 2)
    else:
        for heads, group, head_size, splits in itertools.product((1, 3), (1, 4), (64, 72, 128), (1, 2, 8)):
            compare(heads, group, head_size, [1, 2, 31, 32, 33, 64, 65, 257], splits)
