"""Estimated step times beside measured ones, for layouts of two ranks on this machine.

    python benchmarks/estimate.py [--rounds 5] [--length 128]

llama, hidden 256, 6 layers, 4 heads, ffn 688, vocabulary 8192, adaptive, K = 2, R = 1, fp32, 4 sequences a step in
micro-batches of one, through DeepSpeed with AdamW. Two ranks of one thread each take every layout in turn; `one rank`
does all the work alone, while the other sleeps.

The machine is described to the estimate by four measurements, made in every round by both ranks at the same time (by
one alone for `one rank`): products and attention of the model's shapes, additions of tensors as large as a pass's
activations, and all-reduces of gloo, small and large. Nothing is fitted to step times. Medians over rounds; `relative`
is the time over that of one rank in the same round.
"""

import argparse
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from megatron_ponder.base.launch import discover
from megatron_ponder.cluster.hardware import Hardware
from megatron_ponder.config import Config, read_config
from megatron_ponder.estimates.step_time import step_time
from megatron_ponder.kernels.attention import Call, attend, choose
from megatron_ponder.parallel.process_group import process_group

sys.path.insert(0, str(Path(__file__).parents[1]))  # the repository

from benchmarks.measuring import SMALL_LLAMA, by_name, in_turn, on_ranks, ratio, rounds_of
from benchmarks.two_ranks import Step

HIDDEN, FFN, HEADS = (SMALL_LLAMA[f"model.{name}"] for name in ("hidden_size", "ffn_hidden_size", "num_heads"))
STEPS, REFINEMENTS, SEQUENCES = 2, 1, 4


class Layout(NamedTuple):
    """What two ranks share; `alone` leaves one of them without work."""

    tensor: int = 1
    pipeline: int = 1
    data: int = 1
    zero_stage: int = 0
    recompute: str = "none"
    alone: bool = False


LAYOUTS = {
    "one rank": Layout(alone=True),
    "one rank, recompute block": Layout(alone=True, recompute="block"),
    "tp2": Layout(tensor=2),
    "pp2": Layout(pipeline=2),
    "dp2 ZeRO 1": Layout(data=2, zero_stage=1),
    "dp2 ZeRO 3": Layout(data=2, zero_stage=3),
}


class Machine(NamedTuple):
    """What was measured: operations or bytes a second, and seconds."""

    products: float
    attention: float
    memory: float
    link: float
    latency: float

    def cluster(self, ranks: int) -> Hardware:
        """As the estimate wants it; shares are 1, because rates are measured."""
        return Hardware(
            "CPU", 1, ranks, memory=2**40, peak=self.products, memory_bandwidth=self.memory, intra_bandwidth=self.link,
            inter_bandwidth=self.link, intra_latency=self.latency, inter_latency=self.latency, matrix_share=1.0,
            attention_share=self.attention / self.products, memory_bandwidth_share=1.0, link_share=1.0, device="cpu",
        )  # fmt: skip


def configuration(layout: Layout, length: int) -> Config:
    """The configuration of one case; `length` is L."""
    values = SMALL_LLAMA | {
        "data.sequence_length": length, "ponder.mode": "adaptive",
        "ponder.latent_steps": STEPS, "ponder_training.jacobi_iterations": REFINEMENTS, "training.precision": "fp32",
        "training.micro_batch_size": 1, "training.global_batch_size": SEQUENCES, "parallel.tensor": layout.tensor,
        "parallel.pipeline": layout.pipeline, "parallel.zero_stage": layout.zero_stage,
        "training.recompute": layout.recompute,
    }  # fmt: skip
    return read_config([f"--{key}={value}" for key, value in values.items()])


def usual(action: Callable[[], object], repeats: int = 9) -> float:
    """Median seconds of one call."""
    return statistics.median(in_turn({"action": action}, repeats)["action"])


def measure_machine(length: int, together: bool) -> Machine:
    """Rates of this rank."""
    slots = length * (STEPS + 1)
    x, up, down = torch.randn(slots, HIDDEN), torch.randn(HIDDEN, FFN), torch.randn(FFN, HIDDEN)
    product = usual(lambda: [(x @ up) @ down for _ in range(20)]) / 20
    q, k, v = (torch.randn(1, slots, HEADS, HIDDEN // HEADS, requires_grad=True) for _ in range(3))
    attended = usual(lambda: attend(q, k, v, 0.1).sum().backward())
    pairs = choose(Call("cpu", q.dtype)).pairs(slots)
    a, b, out = torch.randn(slots, HIDDEN), torch.randn(slots, HIDDEN), torch.empty(slots, HIDDEN)
    added = usual(lambda: [torch.add(a, b, out=out) for _ in range(50)]) / 50
    link, latency = float("inf"), 0.0
    if together:
        few, many = torch.ones(64), torch.ones(slots * HIDDEN)
        short, long = (usual(lambda t=t: [dist.all_reduce(t) for _ in range(20)]) / 20 for t in (few, many))
        link, latency = many.nbytes / (long - short), short / 2
    return Machine(
        2 * 2 * slots * HIDDEN * FFN / product,
        7 / 2 * 4 * HIDDEN * pairs / attended,
        3 * a.nbytes / added,
        link,
        latency,
    )


def measure(rounds: int, length: int) -> tuple[list[Machine], list[Machine], dict[str, list[float]]]:
    """The machine for one rank and for two, and seconds of every step by layout, round by round; runs on every rank."""
    with process_group(discover()) as device:
        torch.set_num_threads(1)
        steps = {name: Step(configuration(layout, length), layout.alone, device) for name, layout in LAYOUTS.items()}
        alone, both, times = [], [], []
        actions = {name: partial(step, REFINEMENTS) for name, step in steps.items()}
        for elapsed in rounds_of(actions, rounds, warm_up=2):  # in which DeepSpeed learns the order of modules
            times.append(elapsed)
            both.append(measure_machine(length, together=True))
            dist.barrier()
            if dist.get_rank() == 0:
                alone.append(measure_machine(length, together=False))
            dist.barrier()
    return alone, both, by_name(times)


def median_machine(machines: list[Machine]) -> Machine:
    """Of every rate, the median."""
    return Machine(*(statistics.median(values) for values in zip(*machines, strict=True)))


def main() -> None:
    """Measure, estimate and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--length", type=int, default=128)
    arguments = parser.parse_args()
    *machines, times = on_ranks(2, measure, arguments.rounds, arguments.length)[0]
    alone, both = map(median_machine, machines)
    console = Console(width=120)
    for name, machine in (("one rank", alone), ("each of two", both)):
        link = "" if machine.latency == 0 else f", link {machine.link / 1e9:.2f} GB/s + {machine.latency * 1e6:.0f} µs"
        console.print(
            f"{name}: products {machine.products / 1e9:.1f} GFLOP/s, attention {machine.attention / 1e9:.1f}, "
            f"memory {machine.memory / 1e9:.1f} GB/s{link}",
            highlight=False,
        )
    table = Table(title=f"Seconds a step, sequences of {arguments.length}")
    for heading in (
        "layout",
        "estimated",
        "measured",
        "estimated / measured",
        "relative, estimated",
        "measured",
        "ratio",
    ):
        table.add_column(heading, justify="left" if heading == "layout" else "right")
    estimates = {}
    for name, layout in LAYOUTS.items():
        cluster = alone.cluster(1) if layout.alone else both.cluster(2)
        estimates[name] = step_time(configuration(layout, arguments.length), layout.data, cluster).total
    for name, measured in times.items():
        relative, expected = ratio(measured, times["one rank"]), estimates[name] / estimates["one rank"]
        median = statistics.median(measured)
        table.add_row(
            name, f"{estimates[name]:.3f}", f"{median:.3f}", f"{estimates[name] / median:.2f}", f"{expected:.2f}",
            f"{relative:.2f}", f"{expected / relative:.2f}",
        )  # fmt: skip
    console.print(table)


if __name__ == "__main__":
    main()
