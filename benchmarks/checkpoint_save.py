"""How long a save holds up training, written at once or beside it, against what the machine needs for the bytes alone.

    python benchmarks/checkpoint_save.py [--rounds 5] [--threads 1] [--folder DIR]

An adaptive llama of about 100 M parameters, fp32 weights and two moments, one process; the engine is a stand-in that
has the tensors in memory. The floor of a save at once is writing and syncing the same bytes to one file in the same
folder; that of a save beside training is copying them in memory. Everything is timed in turn, and medians are printed.
`lost` adds to the time held what fixed work (matrix products) takes longer while the files are written.
"""

import argparse
import math
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from megatron_ponder.base.launch import Launch, discover
from megatron_ponder.checkpoint.optimizer_state import ADAMW, WEIGHT
from megatron_ponder.checkpoint.run_state import RunState
from megatron_ponder.config import Config, read_config
from megatron_ponder.model.ponder import PonderLM
from megatron_ponder.parallel.mesh import Mesh
from megatron_ponder.parallel.process_group import process_group
from megatron_ponder.parallel.sharding import declarations, initialize
from megatron_ponder.training.checkpointer import Checkpointer
from megatron_ponder.training.state import StateTensor

sys.path.insert(0, str(Path(__file__).parents[1]))  # the repository

from benchmarks.measuring import ratio, seconds

SECONDS_OF_WORK = 5.0


def configuration(run_dir: Path, asynchronous: bool) -> Config:
    """A model of about 100 M parameters whose checkpoints go into a run folder, one at a time."""
    values = {
        "model.hidden_size": 768, "model.num_layers": 11, "model.num_heads": 12, "model.ffn_hidden_size": 2048,
        "model.vocab_size": 16_000, "ponder.mode": "adaptive", "training.precision": "fp32", "checkpoint.keep": 1,
        "training.run_dir": run_dir, "checkpoint.asynchronous": str(asynchronous).lower(),
    }  # fmt: skip
    return read_config([f"--{key}={value}" for key, value in values.items()])


class State:
    """Weights of a real model and two moments for each, given as an engine gives them."""

    def __init__(self, config: Config) -> None:
        model = PonderLM(config.model, config.ponder)
        initialize(model, seed=0)
        weights = {name: parameter.detach() for name, parameter, *_ in declarations(model)}
        self.parameters = sum(weight.numel() for weight in weights.values())
        self._items = [
            StateTensor(kind, name, weight if kind == WEIGHT else torch.randn_like(weight))
            for name, weight in weights.items()
            for kind in (WEIGHT, *ADAMW)
        ]

    def state(self) -> Iterator[StateTensor]:
        """Every tensor."""
        return iter(self._items)

    def tensors(self) -> list[Tensor]:
        """Every tensor, without its name."""
        return [item.tensor for item in self._items]


def write_plainly(tensors: list[Tensor], path: Path) -> None:
    """The bytes in one file, and on the disk."""
    with path.open("wb", buffering=0) as file:
        for tensor in tensors:
            content = memoryview(tensor.view(-1).numpy()).cast("B")
            for start in range(0, len(content), 8 << 20):
                file.write(content[start : start + (8 << 20)])
        os.fsync(file.fileno())


class Work:
    """Matrix products that take a fixed time on a machine that does nothing else."""

    def __init__(self) -> None:
        self._factor = torch.randn(1024, 1024)
        self._products = 1
        once = statistics.median(seconds(self) for _ in range(5))
        self._products = math.ceil(SECONDS_OF_WORK / once)

    def __call__(self) -> None:
        for _ in range(self._products):
            self._factor @ self._factor


def save_beside(checkpointer: Checkpointer, state: State, step: int, work: Work) -> tuple[float, float, float]:
    """Seconds that the save holds up the loop, until it is durable, and of the work meanwhile."""
    begun = time.perf_counter()
    checkpointer.save(state.state(), RunState(step))
    held = time.perf_counter() - begun
    durable: list[float] = []
    waiter = threading.Thread(target=lambda: (checkpointer.finish(), durable.append(time.perf_counter() - begun)))
    waiter.start()
    worked = seconds(work)
    waiter.join()
    return held, durable[0], worked


def measure(folder: Path, rounds: int) -> tuple[State, dict[str, list[float]]]:
    """Seconds of everything, by name, one for each round after the first."""
    state = State(configuration(folder, asynchronous=False))
    tensors, work = state.tensors(), Work()
    copies = [torch.empty_like(tensor).copy_(tensor) for tensor in tensors]
    at_once, beside = (
        Checkpointer(configuration(folder / name, name == "beside"), None, (None, None), Mesh())
        for name in ("at_once", "beside")
    )
    plain = folder / "plain"
    times: dict[str, list[float]] = {}
    for step in range(1, rounds + 2):
        figures = {
            "write": seconds(lambda: write_plainly(tensors, plain)),
            "copy": seconds(lambda: [copy.copy_(tensor) for copy, tensor in zip(copies, tensors, strict=True)]),
            "at once": seconds(lambda step=step: at_once.save(state.state(), RunState(step))),
            "work": seconds(work),
        }
        plain.unlink()
        figures |= dict(zip(("beside", "durable", "worked"), save_beside(beside, state, step, work), strict=True))
        if step == 1:  # the first round warms up, and the first copy has to be given memory
            times["first"] = [figures["beside"]]
        else:
            for name, value in figures.items():
                times.setdefault(name, []).append(value)
    return state, times


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1, help="of matrix products and copies")
    parser.add_argument("--folder", type=Path, default=Path(), help="where to write; needs 5 GB")
    arguments = parser.parse_args()
    with (
        process_group(Launch(port=discover().port)),
        tempfile.TemporaryDirectory(dir=arguments.folder, prefix="checkpoint_save.") as folder,
    ):
        torch.set_num_threads(arguments.threads)
        state, times = measure(Path(folder), arguments.rounds)
    median = {name: statistics.median(values) for name, values in times.items()}
    size = sum(tensor.nbytes for tensor in state.tensors())

    def over(name: str, floor: str) -> str:
        return f"{ratio(times[name], times[floor]):.2f}"

    slower = statistics.median(x - y for x, y in zip(times["worked"], times["work"], strict=True))
    title = (
        f"{state.parameters / 1e6:.0f} M parameters, {size / 1e9:.2f} GB; written and synced at "
        f"{size / median['write'] / 1e9:.2f} GB/s, copied in memory at {size / median['copy'] / 1e9:.1f} GB/s"
    )
    table = Table(title=title)
    for heading in ("save", "held [s]", "floor [s]", "held / floor", "lost [s]", "durable [s]", "durable / written"):
        table.add_column(heading, justify="left" if heading == "save" else "right")
    held = f"{median['at once']:.2f}"
    table.add_row(
        "at once", held, f"{median['write']:.2f}", over("at once", "write"), held, held, over("at once", "write")
    )
    table.add_row(
        "beside training",
        f"{median['beside']:.2f}",
        f"{median['copy']:.2f}",
        over("beside", "copy"),
        f"{median['beside'] + slower:.2f}",
        f"{median['durable']:.2f}",
        over("durable", "write"),
    )
    console = Console(width=130)
    console.print(table)
    console.print(f"held at once / beside: {over('at once', 'beside')}; the first save beside: {median['first']:.2f} s")


if __name__ == "__main__":
    main()
