"""How long pipeline ranks wait for each other: counted from the schedules that run, and timed on two ranks.

    python benchmarks/pipeline_schedule.py [--rounds 3] [--length 64]

First, every rank's table of actions is taken from the schedule itself and played through: an action starts when its
rank is free and the stage that it depends on has finished. A forward pass takes 1, a backward pass 2, half of it for
the gradients of inputs and half for those of weights where these are apart; once the same in every pass of the model,
once in proportion to the slots of a pass, of which growth passes have fewer. Beside it: the share
(P − 1) / (passes · M + P − 1) of a ring that P ranks fill once for all passes of M micro-batches, and
(P − 1) / (M + P − 1), that of a pipeline that is emptied after every pass. By slots it is counted twice more with sends
and receives that wait for each other as NCCL's do (`benchmarks/rendezvous_sends.py`), on one stream for a rank and on
one for every edge of the ring and direction, which is how they are sent.

Then two ranks of one thread each train a llama of 10 million parameters (hidden 256, 8 layers, 4 heads, ffn 688,
vocabulary 8192, adaptive, K = 2, R = 1) on M micro-batches of one sequence. They take turns with one rank alone that
does the same work with one thread, while the other sleeps. Medians over rounds; speed-ups are medians of the
ratios within a round.
"""

import argparse
import statistics
import sys
from functools import partial
from itertools import product
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from rich.table import Table

from megatron_ponder.base.launch import discover
from megatron_ponder.config import Config, read_config
from megatron_ponder.estimates.schedule_walk import idle_share
from megatron_ponder.model.passes import pass_slots
from megatron_ponder.parallel.pipeline import ScheduleKind
from megatron_ponder.parallel.process_group import process_group

sys.path.insert(0, str(Path(__file__).parents[1]))  # the repository

from benchmarks.measuring import SMALL_LLAMA, by_name, on_ranks, ratio, rounds_of
from benchmarks.rendezvous_sends import busy_share
from benchmarks.two_ranks import Step

KINDS: tuple[ScheduleKind, ...] = ("1f1b", "zero_bubble")
STEPS, REFINEMENTS = 2, 1


def print_counted(console: Console) -> None:
    """The table of idle shares."""
    for title, plan in (("vanilla", pass_slots(0, 0)), ("K = 3, R = 2", pass_slots(3, 2))):
        table = Table(title=f"Idle share, {title}: passes of {', '.join(map(str, plan))} slots")
        headings = ("formula", "equal passes", "by slots", "/ formula", "one stream", "stream an edge", "emptied")
        for heading in ("schedule", "P", "M", *headings):
            table.add_column(heading, justify="left" if heading == "schedule" else "right")
        for kind, ranks, times in product(KINDS, (2, 4, 8), (1, 2, 4)):
            shares = _idle_shares(kind, ranks, ranks * times, plan)
            texts = [
                f"{x:.2f}" if name == "/ formula" else f"{x:.1%}" for name, x in zip(headings, shares, strict=True)
            ]
            table.add_row(kind, str(ranks), str(ranks * times), *texts)
        console.print(table)


def _idle_shares(kind: ScheduleKind, ranks: int, micro_batches: int, plan: tuple[int, ...]) -> tuple[float, ...]:
    formula, emptied = ((ranks - 1) / (runs + ranks - 1) for runs in (len(plan) * micro_batches, micro_batches))
    even, by_slots = (idle_share(kind, ranks, micro_batches, slots) for slots in ((1,) * len(plan), plan))
    streams = (1 - busy_share(kind, ranks, micro_batches, plan, name) for name in ("rank", "edge"))
    return formula, even, by_slots, by_slots / formula, *streams, emptied


class Layout(NamedTuple):
    """What two ranks share; `alone` leaves one of them without work."""

    tensor: int = 1
    pipeline: int = 1
    data: int = 1
    sequence_parallel: bool = False
    schedule: ScheduleKind = "1f1b"
    alone: bool = False


LAYOUTS = {
    "one rank": Layout(alone=True),
    "pp2 1f1b": Layout(pipeline=2),
    "pp2 zero_bubble": Layout(pipeline=2, schedule="zero_bubble"),
    "tp2": Layout(tensor=2),
    "tp2 + sp": Layout(tensor=2, sequence_parallel=True),
    "dp2": Layout(data=2),
}
CASES = {4: ("one rank", "pp2 1f1b"), 8: tuple(LAYOUTS)}


def configuration(layout: Layout, micro_batches: int, length: int) -> Config:
    """The configuration of one case; `length` is L."""
    values = SMALL_LLAMA | {
        "model.num_layers": 8, "data.sequence_length": length, "ponder.mode": "adaptive",
        "ponder.latent_steps": STEPS, "training.precision": "fp32", "training.micro_batch_size": 1,
        "training.global_batch_size": micro_batches, "parallel.tensor": layout.tensor,
        "parallel.pipeline": layout.pipeline, "parallel.pipeline_schedule": layout.schedule,
        "parallel.sequence_parallel": str(layout.sequence_parallel).lower(), "parallel.zero_stage": 0,
    }  # fmt: skip
    return read_config([f"--{key}={value}" for key, value in values.items()])


def time_steps(rounds: int, length: int) -> dict[tuple[int, str], list[float]]:
    """Seconds of every step by number of micro-batches and layout, as this rank sees them."""
    times = {}
    with process_group(discover()) as device:
        torch.set_num_threads(1)
        for micro_batches, names in CASES.items():
            steps = {}
            for name in names:
                layout = LAYOUTS[name]
                config = configuration(layout, micro_batches, length)
                step = Step(config, layout.alone, device)
                steps[micro_batches, name] = partial(step, REFINEMENTS)
            times |= by_name(rounds_of(steps, rounds))
    return times


def print_timed(console: Console, rounds: int, length: int) -> None:
    """The table of step times."""
    times = on_ranks(2, time_steps, rounds, length)[0]
    table = Table(title=f"Two ranks against one, one thread each, sequences of {length}")
    for heading in ("M", "layout", "seconds a step", "speed-up", "ideal", "of the ideal"):
        table.add_column(heading, justify="left" if heading == "layout" else "right")
    plan = pass_slots(STEPS, REFINEMENTS)
    for (micro_batches, name), seconds in times.items():
        layout = LAYOUTS[name]
        speedup = ratio(times[micro_batches, "one rank"], seconds)
        ideal = 1.0 if layout.alone else 2.0
        if layout.pipeline > 1:
            ideal *= 1 - idle_share(layout.schedule, 2, micro_batches, plan)
        median = statistics.median(seconds)
        table.add_row(
            str(micro_batches), name, f"{median:.2f}", f"{speedup:.2f}", f"{ideal:.2f}", f"{speedup / ideal:.0%}"
        )
    console.print(table)


def main() -> None:
    """Count, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--length", type=int, default=64)
    arguments = parser.parse_args()
    console = Console(width=110)
    print_counted(console)
    print_timed(console, arguments.rounds, arguments.length)


if __name__ == "__main__":
    main()
