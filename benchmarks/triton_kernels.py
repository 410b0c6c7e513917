"""What Triton's kernels are compiled to for GPUs that need not be there: registers, spills, shared memory.

    python benchmarks/triton_kernels.py [--head-sizes 64 128] [--dtype bf16]

A table of every kernel of attention, compiled for an A100 (sm_80) and an H100 (sm_90) with key weights and segments,
which take the most. Shared memory may be 227 KiB on an H100. What is chosen for an A100, which has 163 KiB, is taken on
every GPU with less than an H100, and may be the 99 KiB of the least of them.
"""

import argparse
import contextlib
import io
import re
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from rich.console import Console
from rich.table import Table
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

sys.path.insert(0, str(Path(__file__).parents[1]))  # the repository

from megatron_ponder.kernels.triton_attention import Blocks, constants, layout
from megatron_ponder.kernels.triton_code import weighted_attention

LARGEST_SHARED = {80: 99 * 1024, 90: 227 * 1024}
POINTERS = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}
# What is not of the type of queries, keys and values.
TYPES = {
    "LOG_W": "*fp32", "LOG_SUMS": "*fp32", "PRODUCTS": "*fp32", "GRAD_W": "*fp32", "STARTS": "*i32", "ENDS": "*i32",
    "factor": "fp32", "scale": "fp32", "length": "i32", "heads": "i32", "kv_heads": "i32",
}  # fmt: skip


class Resources(NamedTuple):
    """What one program takes.

    Attributes:
        registers: of a thread, of 255.
        spilled: bytes of a thread that have no register.
        shared: bytes.
    """

    registers: int
    spilled: int
    shared: int


def compiled(
    kernel: str, head_size: int, dtype: torch.dtype, capability: int, blocks: Blocks | None = None, group: int = 1
) -> Resources:
    """Compile a kernel of attention for a GPU.

    Args:
        kernel: a field of `Layout`.
        head_size: channels of a head.
        dtype: of queries, keys and values.
        capability: 80 or 90.
        blocks: in place of those that it would be launched with.
        group: heads of queries for each of keys.
    """
    function = getattr(weighted_attention, kernel)
    blocks = blocks or getattr(layout(head_size, dtype, capability), kernel)
    given = constants(head_size, group, blocks, weighted=True, segmented=True)
    types = {name: TYPES.get(name, POINTERS[dtype]) for name in function.arg_names}
    return resources_of(function, types, given, capability, aligned="*i")


def resources_of(
    function: Any, types: dict[str, str], given: dict[str, Any], capability: int, aligned: str = "*"
) -> Resources:
    """Compile a kernel for a GPU.

    Args:
        function: in Triton.
        types: of its arguments that are not given.
        given: constants by name, and options of the compiler.
        capability: 80 or 90.
        aligned: first letters of types whose values are multiples of 16.
    """
    options = {name: value for name, value in given.items() if name not in function.arg_names}
    fixed = {name: value for name, value in given.items() if name in function.arg_names}
    signature = {name: "constexpr" if name in fixed else types[name] for name in function.arg_names}
    multiples = {
        (place,): [["tt.divisibility", 16]] for place, kind in enumerate(signature.values()) if kind[0] in aligned
    }
    source, log = ASTSource(function, signature, constexprs=fixed, attrs=multiples), io.StringIO()
    with contextlib.redirect_stdout(log), triton.knobs.compilation.scope(), triton.knobs.nvidia.scope():
        triton.knobs.compilation.always_compile = triton.knobs.nvidia.dump_ptxas_log = True
        result = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    spilled = sum(map(int, re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log.getvalue()).groups()))
    return Resources(int(re.search(r"Used (\d+) registers", log.getvalue())[1]), spilled, result.metadata.shared)


def main() -> None:
    """Compile and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--head-sizes", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--dtype", choices=["bf16", "fp16", "fp32"], default="bf16")
    arguments = parser.parse_args()
    dtype = {kind[1:]: each for each, kind in POINTERS.items()}[arguments.dtype]
    table = Table(title=f"attention with key weights and segments, {arguments.dtype}")
    for heading in (
        "kernel",
        "head",
        "GPU",
        "queries × keys",
        "warps",
        "stages",
        "registers",
        "spilled",
        "shared [KiB]",
    ):
        table.add_column(heading, justify="right")
    for head_size in arguments.head_sizes:
        for capability in LARGEST_SHARED:
            for kernel, blocks in layout(head_size, dtype, capability)._asdict().items():
                found = compiled(kernel, head_size, dtype, capability)
                cells = (
                    head_size,
                    f"sm_{capability}",
                    f"{blocks.queries} × {blocks.keys}",
                    blocks.warps,
                    blocks.stages,
                )
                numbers = (found.registers, found.spilled, f"{found.shared / 1024:.0f}")
                table.add_row(kernel, *map(str, (*cells, *numbers)))
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
