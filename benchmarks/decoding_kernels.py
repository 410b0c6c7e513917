"""What the kernels of decoding are compiled to for GPUs that need not be there: registers, spills, shared memory.

    python benchmarks/decoding_kernels.py [--head-sizes 64 128] [--groups 1 4]

For an A100 (sm_80) and an H100 (sm_90), whose programs may have 163 and 227 KiB of shared memory.
"""

import argparse
import sys
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[1]))  # the repository

from benchmarks.triton_kernels import LARGEST_SHARED, POINTERS, Resources, resources_of
from megatron_ponder.generation.block_pool import BLOCK
from megatron_ponder.kernels.paged_attention import layout
from megatron_ponder.kernels.triton_code.paged_keys import add_parts, attend_part


def of_decoding(
    head_size: int, group: int, dtype: torch.dtype, splits: int, capability: int, heads: int = 16
) -> dict[str, Resources]:
    """Both kernels as they are launched, the second where there are parts to add.

    Args:
        head_size: channels of a head.
        group: query heads that share a head of keys.
        dtype: of queries, keys and values.
        splits: parts of the keys.
        capability: 80 or 90.
        heads: of keys.
    """
    sizes = layout(group, head_size, dtype)
    types = dict.fromkeys(("q", "keys", "values", "out"), POINTERS[dtype])
    types |= dict.fromkeys(("log_w", "largest", "totals", "parts"), "*fp32")
    types |= dict.fromkeys(("tables", "rows", "lengths"), "*i64") | {"factor": "fp32", "width": "i32"}
    found = {}
    if splits > 1:
        constants = {"HEAD": head_size, "WIDTH": sizes["WIDTH"], "SPLITS": splits, "num_warps": 4}
        found["add_parts"] = resources_of(add_parts, types, constants, capability)
        types |= {"out": "*fp32"}
    constants = {"HEADS": heads, "BLOCK": BLOCK, "SPLITS": splits, **sizes}
    return {"attend_part": resources_of(attend_part, types, constants, capability)} | found


def main() -> None:
    """Compile and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--head-sizes", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--groups", type=int, nargs="+", default=[1, 4])
    arguments = parser.parse_args()
    table = Table(title="decoding, bf16")
    for heading in ("kernel", "head", "group", "parts", "GPU", "registers", "spilled", "shared [KiB]"):
        table.add_column(heading, justify="right")
    for head_size in arguments.head_sizes:
        for group in arguments.groups:
            for splits in (1, 16):
                for capability in LARGEST_SHARED:
                    found = of_decoding(head_size, group, torch.bfloat16, splits, capability)
                    for name, taken in found.items():
                        sizes = (head_size, group, splits, f"sm_{capability}", taken.registers, taken.spilled)
                        table.add_row(name, *map(str, sizes), f"{taken.shared / 1024:.0f}")
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
