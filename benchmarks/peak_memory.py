"""Peak memory of every rank beside what the start-up table expects, in several layouts.

    python benchmarks/peak_memory.py [--length 256] [--cases "pipeline 2" ...]

Each case runs in processes of its own: a llama of 9 million parameters (hidden 256, 6 layers, 4 heads, ffn 688,
vocabulary 8192, adaptive, K = 2, R = 1) in fp32 takes two optimiser steps of 4 micro-batches of 2 sequences on every
data rank. On a CPU the figure is the high-water mark of resident memory from before the model was built, libraries
excluded, with a heap that gives freed blocks back; the heap that training uses keeps them, because that is faster, and
resides in about half as much again. On a GPU it is what PyTorch's allocator handed out at most.
"""

import argparse
import ctypes
import gc
import math
import os
import sys
from pathlib import Path

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


def config_for(name: str, length: int) -> Config:
    """The configuration of a case."""
    ranks, layout = CASES[name]
    shared = math.prod(int(layout.get(f"parallel.{axis}", 1)) for axis in ("tensor", "context", "pipeline"))
    values = SMALL_LLAMA | {
        "ponder.latent_steps": 2, "ponder_training.jacobi_iterations": 1,
        "data.sequence_length": length, "training.precision": "fp32", "training.micro_batch_size": 2,
        "training.global_batch_size": 8 * ranks // shared,
    }  # fmt: skip
    return read_config([f"--{key}={value}" for key, value in (values | layout).items()])


def measure(name: str, length: int) -> tuple[int, int]:
    """This rank's place in the pipeline and its peak in bytes; runs on every rank."""
    config = config_for(name, length)
    with process_group(discover()) as device:
        torch.set_num_threads(1)
        mesh = build_mesh(device, config.parallel)
        ctypes.CDLL(None).mallopt(-3, 128 << 10)  # M_MMAP_THRESHOLD: blocks from this size on go back when freed
        take_steps(config_for(name, 8), mesh, steps=1)  # loads what loads at first use
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


def main() -> None:
    """Run the cases one after another and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    print(f"{'layout':<28}{'pipeline rank':>14}{'measured MiB':>14}{'expected MiB':>14}{'measured / expected':>21}")
    for name in args.cases:
        ranks, _ = CASES[name]
        peaks = dict(on_ranks(ranks, measure, name, args.length).values())
        config = config_for(name, args.length)
        data = data_parallel_size(config, ranks)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        for place, peak in sorted(peaks.items()):
            expected = memory_estimate(Rank(config, data, place, device)).total
            sizes = f"{peak / 2**20:>14,.0f}{expected / 2**20:>14,.0f}{peak / expected:>21.2f}"
            print(f"{name:<28}{place:>14}{sizes}", flush=True)


if __name__ == "__main__":
    main()
