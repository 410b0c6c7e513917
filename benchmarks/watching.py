"""What watching a run costs, as a share of its steps.

    python benchmarks/watching.py [--steps 12]

The model of `training_step.py` (llama, hidden 256, 6 layers, 4 heads, ffn 688, vocabulary 8192, sequence 256, K = 1,
R = 2, adaptive, fp32) on two data ranks of one thread each, two sequences a rank. What is timed are the calls
themselves, as the training loop makes them, on rank 0, which does most: clocks, hooks around the blocks, counts,
comparison of ranks (in every step, where training does it every 100), `metrics.jsonl`, TensorBoard, and a line in
`train.log` (in every step, where training writes one in 10). What each step predicts by itself is timed apart, because
it is a collective of all ranks, and counted as training does it, once in 100 steps. Medians.
"""

import argparse
import statistics
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
from rich.console import Console

from megatron_ponder.base.launch import discover
from megatron_ponder.config import ParallelConfig, read_config
from megatron_ponder.estimates.flops import training_flops
from megatron_ponder.model.ponder import PonderLM
from megatron_ponder.parallel.mesh import build_mesh
from megatron_ponder.parallel.process_group import process_group
from megatron_ponder.parallel.sharding import initialize
from megatron_ponder.runs.metrics import MetricsLog
from megatron_ponder.runs.progress_bar import RunProgress
from megatron_ponder.runs.run_log import RunLog
from megatron_ponder.training.deepspeed_engine import Engine
from megatron_ponder.training.objective import Objective
from megatron_ponder.training.step_watch import StepWatch
from megatron_ponder.training.validation import measure_each_step

sys.path.insert(0, str(Path(__file__).parents[1]))  # the repository

from benchmarks.measuring import SMALL_LLAMA, on_ranks, ratio

BATCH, LENGTH, REFINEMENTS, PASSES = 4, 256, 2, 4
INTERVAL = 100  # of `logging.own_losses_interval` unless set


class Stopwatch:
    """Adds up the time of calls."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self, action, *arguments):
        """Call it, and count the time."""
        begun = time.perf_counter()
        result = action(*arguments)
        self.seconds += time.perf_counter() - begun
        return result


def hooks_of_a_step(transformer: torch.nn.Module) -> float:
    """Seconds that the hooks of one step take, from a thousand calls of each."""
    before, after = transformer._forward_pre_hooks.values(), transformer._forward_hooks.values()
    begun = time.perf_counter()
    for _ in range(1000):
        for hook in before:
            hook(transformer, ())
        for hook in after:
            hook(transformer, (), None)
    return (time.perf_counter() - begun) / 1000 * PASSES


def measure(steps: int, folder: str) -> tuple[list[float], list[float], list[float]]:
    """Seconds of every step, of watching it, and of measuring what each step predicts, as this rank sees them."""
    values = SMALL_LLAMA | {
        "data.sequence_length": LENGTH, "ponder.mode": "adaptive", "ponder.latent_steps": 1,
        "ponder_training.jacobi_iterations": REFINEMENTS, "training.precision": "fp32",
        "training.global_batch_size": BATCH, "training.micro_batch_size": BATCH // 2, "logging.straggler_interval": 1,
    }  # fmt: skip
    config = read_config([f"--{key}={value}" for key, value in values.items()])
    whole, watching, own = [], [], []
    with process_group(discover()) as device:
        torch.set_num_threads(1)
        mesh = build_mesh(device, ParallelConfig())
        model = PonderLM(config.model, config.ponder, mesh)
        initialize(model, seed=0)
        engine, watch = (
            Engine(Objective(model), config, mesh),
            StepWatch(config, mesh, model.transformer),
        )
        leader = dist.get_rank() == 0
        log = MetricsLog(Path(folder), config.logging, 0) if leader else None
        progress = RunProgress(steps, 0, interval=1, log=RunLog(Path(folder))) if leader else nullcontext()
        tokens = torch.randint(0, 8192, (BATCH // 2, LENGTH + 1), generator=torch.Generator().manual_seed(0))
        flops = training_flops(config, REFINEMENTS)
        with progress:
            for step in range(1, steps + 1):
                clock, own_clock, begun = Stopwatch(), Stopwatch(), time.perf_counter()
                clock(watch.begin)
                clock(watch.mark)
                with watch.aside():
                    own_clock(measure_each_step, mesh, engine, [tokens], REFINEMENTS, engine.rule("soft"))
                engine.forward_backward([tokens], REFINEMENTS, engine.rule("soft"), 0.0, 1 / (BATCH * LENGTH))
                clock(watch.mark)
                norm = engine.step(1e-4)
                clock(watch.mark)
                measured, _ = clock(watch.end, flops, float(BATCH * LENGTH), BATCH * LENGTH)
                record = {
                    "step": step,
                    "steps_left": steps - step,
                    "loss": 1.0,
                    "grad_norm": norm,
                    "mean_latent_steps": 1.0,
                    "latent_step_histogram": [0, 1],
                }
                record |= dict.fromkeys(("cross_entropy", "learning_rate", "penalty", "penalty_weight"), 1.0)
                record |= measured
                if leader:
                    clock(log.write, record)
                    clock(progress.update, record)
                if step > 2:
                    whole.append(time.perf_counter() - begun - own_clock.seconds)
                    watching.append(clock.seconds)
                    own.append(own_clock.seconds)
        hooks = hooks_of_a_step(model.transformer)
        watch.close()
        if leader:
            log.close()
    return whole, [seconds + hooks for seconds in watching], own


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=12)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        whole, watching, own = on_ranks(2, measure, arguments.steps, folder)[0]
    step, cost, apart = map(statistics.median, (whole, watching, own))
    Console(width=110).print(
        f"a step {step:.3f} s, of which watching {cost * 1e3:.2f} ms: {ratio(watching, whole):.3%}; what each step "
        f"predicts {apart:.3f} s once in {INTERVAL}: {apart / step / INTERVAL:.2%}",
        highlight=False,
    )


if __name__ == "__main__":
    main()
