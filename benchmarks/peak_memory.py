"""Peak memory of every rank beside what the start-up table expects, in several layouts.

    python benchmarks/peak_memory.py [--length 256] [--cases "pipeline 2" ...] [--micro-batch 2] [--micro-batches 4]
    python benchmarks/peak_memory.py --length 256 512 768 --longest 1 8 --cases "one process" "context 2"

Each case runs in processes of its own: a llama of 9 million parameters (hidden 256, 6 layers, 4 heads, ffn 688,
vocabulary 8192, adaptive, K = 2, R = 1) in fp32 takes two optimiser steps of 4 micro-batches of 2 sequences on every
data rank. With `--longest` a line through the peaks at several lengths, least squares, says which sequence is the
longest that stays below so many GiB on the fullest rank, and the table which it says is; a limit beyond the peaks is
an extrapolation, and the peak of a short sequence may be that of the start.

On a CPU the figure is the high-water mark of resident memory from before the model was built, libraries excluded, with
a heap that gives freed blocks back; the heap that training uses keeps them, because that is faster, and resides in
about half as much again. On a GPU it is what PyTorch's allocator handed out at most.
"""

import argparse
import ctypes
import gc
import math
import os
import statistics
import sys
from bisect import bisect
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from megatron_ponder.base.launch import discover
from megatron_ponder.config import Config, data_parallel_size, read_config
from megatron_ponder.config.layout import own_length
from megatron_ponder.estimates.memory import memory_estimate
from megatron_ponder.estimates.rank import Rank
from megatron_ponder.model.build import build_part
from megatron_ponder.parallel.mesh import build_mesh
from megatron_ponder.parallel.process_group import process_group
from megatron_ponder.parallel.sharding import initialize
from megatron_ponder.training.deepspeed_engine import Engine
from megatron_ponder.training.objective import Objective

sys.path.insert(0, str(Path(__file__).parents[1]))  # the repository

from benchmarks.measuring import SMALL_LLAMA, on_ranks, resident

CASES: dict[str, tuple[int, dict[str, object]]] = {
    "one process": (1, {}),
    "recompute attention": (1, {"training.recompute": "attention"}),
    "recompute block": (1, {"training.recompute": "block"}),
    "recompute block, 2 passes": (1, {"training.recompute": "block", "training.recompute_passes": 2}),
    "tensor 2": (2, {"parallel.tensor": 2}),
    "tensor 2, sequence": (2, {"parallel.tensor": 2, "parallel.sequence_parallel": "true"}),
    "context 2": (2, {"parallel.context": 2}),
    "context 4": (4, {"parallel.context": 4}),
    "context 2, recompute block": (2, {"parallel.context": 2, "training.recompute": "block"}),
    "pipeline 2": (2, {"parallel.pipeline": 2}),
    "data 2, ZeRO 1": (2, {"parallel.zero_stage": 1}),
    "data 2, ZeRO 2": (2, {"parallel.zero_stage": 2}),
    "data 2, ZeRO 3": (2, {"parallel.zero_stage": 3}),
}


class Case(NamedTuple):
    """A name of `CASES`, tokens of a sequence, and of how many sequences and micro-batches a step is on a data rank."""

    name: str
    length: int
    micro_batch: int = 2
    micro_batches: int = 4


def config_for(case: Case) -> Config:
    """The configuration of a case."""
    ranks, layout = CASES[case.name]
    shared = math.prod(int(layout.get(f"parallel.{axis}", 1)) for axis in ("tensor", "context", "pipeline"))
    values = SMALL_LLAMA | {
        "ponder.latent_steps": 2, "ponder_training.jacobi_iterations": 1,
        "data.sequence_length": case.length, "training.precision": "fp32",
        "training.micro_batch_size": case.micro_batch,
        "training.global_batch_size": case.micro_batch * case.micro_batches * ranks // shared,
    }  # fmt: skip
    return read_config([f"--{key}={value}" for key, value in (values | layout).items()])


def measure(case: Case) -> tuple[int, int]:
    """This rank's place in the pipeline and its peak in bytes; runs on every rank."""
    config = config_for(case)
    with process_group(discover()) as device:
        torch.set_num_threads(1)
        mesh = build_mesh(device, config.parallel)
        ctypes.CDLL(None).mallopt(-3, 128 << 10)  # M_MMAP_THRESHOLD: blocks from this size on go back when freed
        take_steps(config_for(case._replace(length=8)), mesh, steps=1)  # loads what loads at first use
        gc.collect()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        else:
            ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")
        before = resident("VmRSS")
        take_steps(config, mesh, steps=2)
        peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else resident("VmHWM") - before
    return mesh.pipeline.rank, peak


def take_steps(config: Config, mesh, steps: int) -> None:
    """Build the model and train it on random tokens."""
    model = build_part(config, mesh)
    initialize(model, seed=0)
    engine = Engine(Objective(model.to(mesh.device)), config, mesh)
    own = config.training.global_batch_size // mesh.data.size
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        tokens = torch.randint(0, 8192, (own, own_length(config) + 1), generator=generator).to(mesh.device)
        micro_batches = tokens.split(config.training.micro_batch_size)
        engine.forward_backward(micro_batches, 1, engine.rule("soft"), 0.0, 1e-3)
        engine.step(1e-4)


def expected(case: Case, place: int = 0) -> int:
    """Bytes that the printed table says of a place in the pipeline."""
    ranks, _ = CASES[case.name]
    config = config_for(case)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return memory_estimate(Rank(config, data_parallel_size(config, ranks), place, device)).total


def print_peaks(case: Case) -> int:
    """Measure a case and print a line for each place in its pipeline. Returns the largest peak in bytes."""
    ranks, _ = CASES[case.name]
    peaks = {}
    for place, peak in on_ranks(ranks, measure, case).values():
        peaks[place] = max(peak, peaks.get(place, 0))
    for place, peak in sorted(peaks.items()):
        paper = expected(case, place)
        sizes = f"{peak / 2**20:>14,.0f}{paper / 2**20:>14,.0f}{peak / paper:>21.2f}"
        print(f"{case.name:<28}{case.length:>8}{place:>14}{sizes}", flush=True)
    return max(peaks.values())


def print_longest(case: Case, peaks: dict[int, int], limits: Sequence[float]) -> None:
    """Print the longest sequence below each limit in GiB, by the peaks at several lengths and by the table."""
    slope, base = statistics.linear_regression(*zip(*peaks.items(), strict=True))
    context = config_for(case).parallel.context
    print(f"{case.name}: {base / 2**20:,.0f} MiB and {slope / 2**10:,.0f} KiB a token")
    for limit in limits:
        most = limit * 2**30
        measured = int((most - base) / slope)
        shares = range(context, 2 * measured, context)
        paper = context * bisect(shares, most, key=lambda length: expected(case._replace(length=length)))
        print(f"  below {limit:g} GiB: {measured // context * context:,} tokens, by the table {paper:,}")


def main() -> None:
    """Run the cases one after another and print what they need."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, nargs="+", default=[256])
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--micro-batch", type=int, default=2)
    parser.add_argument("--micro-batches", type=int, default=4)
    parser.add_argument("--longest", type=float, nargs="+", default=[], metavar="GIB")
    args = parser.parse_args()
    if args.longest and len(args.length) < 2:
        parser.error("--longest needs peaks at several lengths; give --length at least two")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    columns = f"{'pipeline rank':>14}{'measured MiB':>14}{'expected MiB':>14}{'measured / expected':>21}"
    print(f"{'layout':<28}{'tokens':>8}{columns}")
    for name in args.cases:
        case = Case(name, args.length[0], args.micro_batch, args.micro_batches)
        peaks = {length: print_peaks(case._replace(length=length)) for length in args.length}
        if args.longest:
            print_longest(case, peaks, args.longest)


if __name__ == "__main__":
    main()
