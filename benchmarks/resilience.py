"""What failures cost: from the kill of a rank to the end of its job, from a restart to its first step, and per step.

    python benchmarks/resilience.py [--part end|restart|step]

`end`: SIGKILL of one of two ranks, to the end of all processes, with and without torchrun. `restart`: a preempted run
that goes on, second by second, up to its first new step. `step`: what agreeing on whether to stop, looking for numbers
that are not finite and beating for the watchdog add to a step, timed in turn in one process.
"""

import argparse
import os
import re
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

from benchmarks.small_corpus import small_corpus  # noqa: E402

STEP_LINE = re.compile(r"step (\d+)/")
SHAPE = {
    "model.hidden_size": 64,
    "model.num_layers": 2,
    "model.num_heads": 4,
    "ponder.latent_steps": 2,
    "data.split": "90,10,0",
    "data.sequence_length": 128,
    "data.num_workers": 0,
    "training.precision": "fp32",
    "training.global_batch_size": 8,
    "training.micro_batch_size": 4,
    "training.steps": 10**6,
    "training.eval_interval": 0,
    "checkpoint.interval": 1000,
    "checkpoint.resume": "auto",
    "logging.interval": 1,
    "logging.tensorboard": "false",
}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", choices=("end", "restart", "step"), help="all of them unless given")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        corpus = small_corpus(Path(folder))
        settings = SHAPE | {"data.path": corpus.dataset, "tokenizer.path": corpus.tokenizer}
        for name, measure in {"end": measure_end, "restart": measure_restart, "step": measure_step}.items():
            if options.part in (None, name):
                runs = Path(folder) / name
                runs.mkdir()
                measure(settings, runs, options.repeats)


def start(settings: dict, run_dir: Path, torchrun: bool, output: Path) -> list[subprocess.Popen]:
    """Two ranks, or their launcher."""
    arguments = [f"--{key}={value}" for key, value in (settings | {"training.run_dir": run_dir}).items()]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONUNBUFFERED": "1"}
    program = ["pretrain_ponder.py", *arguments]
    with output.open("w") as file:
        common = {"cwd": REPOSITORY, "stdout": file, "stderr": subprocess.STDOUT}
        if torchrun:
            launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", *program]
            return [subprocess.Popen(launch, env=environment, **common)]
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1]), "WORLD_SIZE": "2"}
        return [
            subprocess.Popen([sys.executable, *program], env=environment | {"RANK": str(rank)}, **common)
            for rank in range(2)
        ]


def wait_until(condition: Callable[[], bool], seconds: float = 300.0) -> None:
    """Look a hundred times a second."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            sys.exit("it took too long")
        time.sleep(0.01)


def measure_end(settings: dict, folder: Path, repeats: int) -> None:
    """From SIGKILL of rank 1 to the end of the last process."""
    for torchrun in (False, True):
        seconds = []
        for repeat in range(repeats):
            output = folder / f"output-{torchrun}-{repeat}"
            processes = start(settings, folder / f"run-{torchrun}-{repeat}", torchrun, output)
            wait_until(lambda output=output: "step 3/" in output.read_text())
            victim = processes[-1].pid
            if torchrun:
                children = subprocess.run(["pgrep", "-P", str(victim)], capture_output=True, text=True, check=True)
                victim = int(children.stdout.split()[1])
            begun = time.monotonic()
            os.kill(victim, signal.SIGKILL)
            for process in processes:
                process.wait()
            seconds.append(time.monotonic() - begun)
        name = "torchrun" if torchrun else "no launcher"
        print(f"SIGKILL of a rank to the end of the job, {name}: {_spread(seconds)}", flush=True)


def measure_restart(settings: dict, folder: Path, repeats: int) -> None:
    """Preempt after some steps, start again, and see when what is done."""
    output, seconds, lost = folder / "output", [], []
    parts: dict[str, list[float]] = {}
    for repeat in range(repeats + 1):
        begun = time.monotonic()
        processes = start(settings, folder / "run", False, output)
        wait_until(lambda: STEP_LINE.search(output.read_text()) is not None)
        if repeat > 0:
            seconds.append(time.monotonic() - begun)
        steps = [int(step) for step in STEP_LINE.findall(output.read_text())]
        wait_until(lambda wanted=steps[0] + 5: f"step {wanted}/" in output.read_text())
        if repeat > 0:
            total, timed = re.search(r"ready after ([\d.]+) s: (.*)", output.read_text()).groups()
            for value, part in re.findall(r"([\d.]+) s ([^,\n]+)", timed):
                parts.setdefault(part, []).append(float(value))
            parts.setdefault("before, and the first step", []).append(seconds[-1] - float(total))
        processes[1].send_signal(signal.SIGUSR1)
        if any(process.wait() != 75 for process in processes):
            sys.exit(output.read_text())
        last = max(int(step) for step in STEP_LINE.findall(output.read_text()))
        saved = int(re.search(r"stopped at step (\d+)", output.read_text()).group(1))
        lost.append(last - saved)
    print(f"restart to the first new step: {_spread(seconds)}", flush=True)
    for part, values in parts.items():
        print(f"    {part}: {_spread(values)}")
    print(f"steps lost by each of {len(lost)} preemptions: {sorted(lost)}")


def measure_step(settings: dict, folder: Path, repeats: int) -> None:
    """Parts of a step that are there for failures, each timed beside whole steps, in one process."""
    os.environ.update(DS_ACCELERATOR="cpu", CUDA_VISIBLE_DEVICES="")
    import torch

    from megatron_ponder.base.launch import discover
    from megatron_ponder.base.signals import StopSignals
    from megatron_ponder.base.watchdog import Watchdog
    from megatron_ponder.checkpoint.run_state import RunState
    from megatron_ponder.config import ParallelConfig, read_config
    from megatron_ponder.data.loader import batches
    from megatron_ponder.parallel.mesh import build_mesh
    from megatron_ponder.parallel.process_group import process_group
    from megatron_ponder.training.boundary import Boundary
    from megatron_ponder.training.deepspeed_engine import Engine
    from megatron_ponder.training.initial_weights import build_model
    from megatron_ponder.training.loss_spikes import LossSpikes
    from megatron_ponder.training.objective import Objective
    from megatron_ponder.training.setup import open_parts
    from megatron_ponder.training.skipped_steps import SkippedSteps

    torch.set_num_threads(1)
    config = read_config([f"--{key}={value}" for key, value in (settings | {"training.run_dir": folder}).items()])
    with process_group(discover({})), StopSignals() as signals, Watchdog(600) as watchdog:
        config, parts = open_parts(config)
        mesh = build_mesh(torch.device("cpu"), ParallelConfig())
        engine = Engine(Objective(build_model(config, parts, mesh, None)), config, mesh)
        boundary, skipped, spikes = (
            Boundary(signals, 1e9, mesh),
            SkippedSteps(RunState(), config.training),
            LossSpikes(10, []),
        )
        loader = batches(parts.datasets["train"], 0, 8, 4, 0, 1)
        steps, guards = [], []
        for step in range(40 * repeats):
            begun = time.perf_counter()
            sums = engine.forward_backward(next(loader), 2, engine.rule("soft"), 0.0, 1 / (8 * 128))
            norm = engine.step(1e-3)
            between = time.perf_counter()
            boundary.begin(1.0)
            sums = boundary.cross(sums)
            watchdog.beat()
            if not skipped.note(step, norm):
                spikes.score(float(sums[0]))
            skipped.too_many(step)
            steps.append(between - begun)
            guards.append(time.perf_counter() - between)
    share = statistics.median(guards) / statistics.median(steps)
    print(
        f"a step of {statistics.median(steps) * 1e3:.1f} ms; what is done in it for failures: "
        f"{statistics.median(guards) * 1e6:.0f} µs, {100 * share:.3f} %"
    )


def _spread(seconds: list[float]) -> str:
    return f"{statistics.median(seconds):.1f} s (median of {len(seconds)}, {min(seconds):.1f} to {max(seconds):.1f})"


if __name__ == "__main__":
    main()
