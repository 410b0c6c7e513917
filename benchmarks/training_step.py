"""One optimiser step of a small model against the machine's own matrix-multiplication rate.

    python benchmarks/training_step.py [--rounds 7] [--threads 2]
    python benchmarks/training_step.py --cases "adaptive fp32" "adaptive fp32, compiled"

llama, hidden 256, 6 layers, 4 heads, ffn 688, vocabulary 8192, sequence 256, batch 4, K = 1, R = 2, through DeepSpeed
with AdamW. The floor counts 6 × block parameters × slots over all passes (7 a token) and 6 × head parameters × tokens,
attention left out, at the rate of a 2048³ fp32 product. Steps and products are timed in turn in one process; medians
are printed. Peak memory is that of a process of its own that trains nothing else.
"""

import argparse
import os
import statistics
import subprocess
import sys
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from megatron_ponder.base.launch import Launch, discover
from megatron_ponder.config import Config, ParallelConfig, read_config
from megatron_ponder.model.build import build_part
from megatron_ponder.model.passes import pass_slots
from megatron_ponder.parallel.mesh import Mesh, build_mesh
from megatron_ponder.parallel.process_group import process_group
from megatron_ponder.parallel.sharding import initialize
from megatron_ponder.training.compiling import compile_blocks
from megatron_ponder.training.deepspeed_engine import Engine
from megatron_ponder.training.objective import Objective

sys.path.insert(0, str(Path(__file__).parents[1]))  # the repository

from benchmarks.measuring import SMALL_LLAMA, in_turn, ratio, resident

BATCH, LENGTH, REFINEMENTS = 4, 256, 2
CASES = {
    "fixed fp32": {"ponder.mode": "fixed"},
    "adaptive fp32": {"ponder.mode": "adaptive"},
    "fixed bf16": {"ponder.mode": "fixed", "training.precision": "bf16"},
    "fixed fp32, recompute": {"ponder.mode": "fixed", "training.recompute": "block"},
    "fixed fp32, compiled": {"ponder.mode": "fixed", "training.compile": True},
    "adaptive fp32, compiled": {"ponder.mode": "adaptive", "training.compile": True},
}
# Compilers take long before the first step.
USUAL = [case for case, values in CASES.items() if "training.compile" not in values]


def configuration(case: str) -> Config:
    """The configuration of one case."""
    values = SMALL_LLAMA | {
        "data.sequence_length": LENGTH, "ponder.latent_steps": 1, "ponder_training.jacobi_iterations": REFINEMENTS,
        "training.precision": "fp32", "training.global_batch_size": BATCH, "training.micro_batch_size": BATCH,
        "parallel.zero_stage": 0,
    } | CASES[case]  # fmt: skip
    return read_config([f"--{key}={value}" for key, value in values.items()])


class Step:
    """Runs optimiser steps of one case."""

    def __init__(self, case: str, mesh: Mesh) -> None:
        config = configuration(case)
        model = build_part(config, mesh)
        initialize(model, seed=0)
        self._engine = Engine(Objective(model), config, mesh)
        compile_blocks(model, config, mesh.device)
        self._tokens = torch.randint(0, 8192, (BATCH, LENGTH + 1), generator=torch.Generator().manual_seed(0))
        slots = sum(pass_slots(1, REFINEMENTS))
        blocks = sum(parameter.numel() for parameter in model.transformer.blocks.parameters())
        self.flops = 6 * (blocks * slots + model.head.weight.numel()) * BATCH * LENGTH

    def __call__(self) -> None:
        rule = self._engine.rule("soft")
        self._engine.forward_backward([self._tokens], REFINEMENTS, rule, 0.0, 1 / (BATCH * LENGTH))
        self._engine.step(1e-4)


def memory_of(case: str, arguments: argparse.Namespace) -> float:
    """Peak resident memory in GB of a process that takes three steps."""
    words = [sys.executable, __file__, "--memory", case, "--threads", str(arguments.threads)]
    alone = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "MASTER_PORT")}
    return float(subprocess.run(words, env=alone, capture_output=True, text=True, check=True).stdout.split()[-1])


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=USUAL)
    parser.add_argument("--memory", choices=CASES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    with process_group(Launch(port=discover().port)) as device:
        torch.set_num_threads(arguments.threads)
        mesh = build_mesh(device, ParallelConfig())
        if arguments.memory:
            step = Step(arguments.memory, mesh)
            for _ in range(3):
                step()
            print(resident("VmHWM") / 1e9)  # `getrusage` would count that of the parent before the exec
            return
        steps = {case: Step(case, mesh) for case in arguments.cases}
        a, b = torch.randn(2048, 2048), torch.randn(2048, 2048)
        times = in_turn(steps | {"product": lambda: [a @ b for _ in range(4)]}, arguments.rounds)
    median = {name: statistics.median(values) for name, values in times.items()}
    rate = 4 * 2 * 2048**3 / median["product"]
    table = Table(title=f"2048³ fp32 product: {rate / 1e9:.0f} GFLOP/s on {arguments.threads} threads")
    for heading in ("case", "seconds a step", "floor / measured", f"over {arguments.cases[0]}", "peak memory, GB"):
        table.add_column(heading, justify="left" if heading == "case" else "right")
    for case, step in steps.items():
        over = ratio(times[case], times[arguments.cases[0]])
        share = step.flops / (8 * 2048**3) * ratio(times["product"], times[case])
        table.add_row(case, f"{median[case]:.3f}", f"{share:.1%}", f"{over:.2f}", f"{memory_of(case, arguments):.2f}")
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
