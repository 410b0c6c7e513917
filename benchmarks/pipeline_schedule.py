"""How long pipeline ranks wait for each other: counted from the schedules that run, and timed on two ranks.

    python benchmarks/pipeline_schedule.py [--rounds 3] [--length 64]

First, every rank's table of actions is taken from the schedule itself and played through without communication: an
action starts when its rank is free and the stage that it depends on has finished. A forward pass takes 1, a backward
pass 2, half of it for the gradients of inputs and half for those of weights where these are apart; once the same in
every pass of the model, once in proportion to the slots of a pass, of which growth passes have fewer. Beside it: the
share (P − 1) / (passes · M + P − 1) of a ring that P ranks fill once for all passes of M micro-batches, and
(P − 1) / (M + P − 1), that of a pipeline that is emptied after every pass.

Then two ranks of one thread each train a llama of 10 million parameters (hidden 256, 8 layers, 4 heads, ffn 688,
vocabulary 8192, adaptive, K = 2, R = 1) on M micro-batches of one sequence. They take turns with one rank alone that
does the same work with one thread, while the other sleeps. Medians over rounds; speed-ups are medians of the
ratios within a round.
"""

import argparse
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_ponder.base.launch import discover
from megatron_ponder.config import Config, read_config
from megatron_ponder.model.passes import pass_slots
from megatron_ponder.parallel.mesh import Axis
from megatron_ponder.parallel.pipeline import ScheduleKind, build_schedule
from megatron_ponder.parallel.process_group import process_group

sys.path.insert(0, str(Path(__file__).parents[1]))  # the repository

from benchmarks.measuring import SMALL_LLAMA, by_name, on_ranks, ratio, rounds_of
from benchmarks.two_ranks import Step

KINDS: tuple[ScheduleKind, ...] = ("1f1b", "zero_bubble")
COSTS = {"F": 1.0, "B": 2.0, "I": 1.0, "W": 1.0}  # forward; backward: whole, of inputs, of weights
STEPS, REFINEMENTS = 2, 1


class Action(NamedTuple):
    """What a rank does next; `kind` is a key of `COSTS`."""

    stage: int
    kind: str
    micro_batch: int


def actions_of(kind: ScheduleKind, ranks: int, micro_batches: int, passes: int) -> dict[int, list[Action]]:
    """Each rank's actions in the order of the schedule that training builds, without sends and receives."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    try:
        schedule = build_schedule(
            rounds=[nn.Identity() for _ in range(passes)],
            carried=[1] * (passes * ranks - 1),
            first_input=torch.zeros(1),
            last_output=torch.zeros(1),
            dtype=torch.float32,
            micro_batches=micro_batches,
            axis=Axis(ranks, 0, dist.group.WORLD),
            device=torch.device("cpu"),
            kind=kind,
            loss_function=lambda output, _: output,
        )
    finally:
        dist.destroy_process_group()
    return {
        rank: [Action(a.stage_index, a.computation_type.value, a.microbatch_index) for a in actions if a.is_compute_op]
        for rank, actions in schedule.pipeline_order_with_comms.items()
    }


def idle_share(actions: Mapping[int, Sequence[Action]], duration: Callable[[Action], float]) -> float:
    """Share of all ranks' time, from the first action to the last, in which they do nothing.

    Raises:
        ValueError: if the ranks wait for each other for ever.
    """
    last_stage = max(action.stage for own in actions.values() for action in own)
    free, finished = dict.fromkeys(actions, 0.0), {}
    waiting = {rank: list(reversed(own)) for rank, own in actions.items()}
    while any(waiting.values()):
        before = len(finished)
        for rank, own in waiting.items():
            while own and all(need in finished for need in _needs(own[-1], last_stage)):
                action = own.pop()
                start = max([free[rank], *(finished[need] for need in _needs(action, last_stage))])
                free[rank] = finished[_result(action)] = start + duration(action)
        if len(finished) == before:
            raise ValueError(f"nothing can start of {[own[-1] for own in waiting.values() if own]}")
    busy = sum(duration(action) for own in actions.values() for action in own)
    return 1 - busy / (len(actions) * max(free.values()))


def _result(action: Action) -> tuple[str, int, int]:
    """What others wait for: of a backward pass in two parts, the gradients of the inputs."""
    return "I" if action.kind == "B" else action.kind, action.stage, action.micro_batch


def _needs(action: Action, last_stage: int) -> list[tuple[str, int, int]]:
    kind, stage, micro_batch = _result(action)
    if kind == "F":
        return [("F", stage - 1, micro_batch)] if stage else []
    if kind == "W":
        return [("I", stage, micro_batch)]
    return [("F", stage, micro_batch)] + ([("I", stage + 1, micro_batch)] if stage < last_stage else [])


def idle_of(kind: ScheduleKind, ranks: int, micro_batches: int, plan: Sequence[int]) -> tuple[float, float]:
    """Idle share with passes that take the same time, and with passes that take time in proportion to their slots."""
    actions = actions_of(kind, ranks, micro_batches, len(plan))
    even = idle_share(actions, lambda action: COSTS[action.kind])
    return even, idle_share(actions, lambda action: COSTS[action.kind] * plan[action.stage // ranks])


def print_counted(console: Console) -> None:
    """The table of idle shares."""
    for title, plan in (("vanilla", pass_slots(0, 0)), ("K = 3, R = 2", pass_slots(3, 2))):
        table = Table(title=f"Idle share, {title}: passes of {', '.join(map(str, plan))} slots")
        for heading in (
            "schedule",
            "P",
            "M",
            "formula",
            "equal passes",
            "/ formula",
            "by slots",
            "/ formula",
            "emptied",
        ):
            table.add_column(heading, justify="left" if heading == "schedule" else "right")
        for kind in KINDS:
            for ranks in (2, 4, 8):
                for micro_batches in (ranks, 2 * ranks, 4 * ranks):
                    formula = (ranks - 1) / (len(plan) * micro_batches + ranks - 1)
                    emptied = (ranks - 1) / (micro_batches + ranks - 1)
                    even, by_slots = idle_of(kind, ranks, micro_batches, plan)
                    shares = (formula, even, even / formula, by_slots, by_slots / formula, emptied)
                    texts = [f"{x:.2f}" if index in (2, 4) else f"{x:.1%}" for index, x in enumerate(shares)]
                    table.add_row(kind, str(ranks), str(micro_batches), *texts)
        console.print(table)


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
            ideal *= 1 - idle_of(layout.schedule, 2, micro_batches, plan)[1]
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
