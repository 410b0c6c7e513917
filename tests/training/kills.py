"""Runs whose ranks are killed: in a certain step, or again and again wherever they are."""

import json
import os
import random
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from megatron_ponder.commands.ponder import start
from megatron_ponder.training import loop
from megatron_ponder.training.deepspeed_engine import Engine
from megatron_ponder.training.schedules import StepPlan, plan_step
from tests.processes import Forked, environments

SECONDS = 60  # within which a start takes its first step, and the others end when one is killed
PATIENCE = 20  # seconds for the run to come to where it is to be killed
PLACES = ("start", "step", "save", "validation")


def start_ranks(ranks: int, output: Path, arguments: list[str], steps: int | None = None) -> list[Forked]:
    """Start a run, all of whose ranks write to one file, and die in the step after `steps` of them if that is given."""
    dies = {} if steps is None else {"program": _start_to_die}
    variables = {} if steps is None else {"DIES_AFTER": str(steps)}
    with output.open("w") as file:
        streams = {"stdout": file, "stderr": subprocess.STDOUT}
        every = environments(ranks)
        return [Forked("train", *arguments, env=env | variables, **dies, **streams) for env in every]


def _start_to_die() -> None:
    """A command that is killed between the backward passes of a step and its update."""
    planned, step = [], Engine.step

    def noted(done: int, *arguments) -> StepPlan:
        planned.append(done)
        return plan_step(done, *arguments)

    def deadly(engine: Engine, learning_rate: float) -> float:
        if planned[-1:] == [int(os.environ["DIES_AFTER"])]:  # the first step of all makes moments
            os.kill(os.getpid(), signal.SIGKILL)
        return step(engine, learning_rate)

    loop.plan_step, Engine.step = noted, deadly
    start()


def reap(ranks: list[Forked], seconds: float) -> list[int]:
    """Exit codes of ranks that end by themselves within so many seconds."""
    deadline = time.monotonic() + seconds
    try:
        return [rank.wait(max(0.0, deadline - time.monotonic())) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()


def alive_in(sessions: set[int]) -> list[str]:
    """Processes of these sessions."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) in sessions and fields[0] != "Z":
            found.append(stat.parent.name)
    return found


class Watched:
    """A run as its folder shows it from outside, while it goes on."""

    def __init__(self, run_dir: Path, eval_interval: int) -> None:
        """Watch a run folder, in which there need not be anything yet."""
        self._metrics, self._checkpoints, self._interval = (
            run_dir / "metrics.jsonl",
            run_dir / "checkpoints",
            eval_interval,
        )

    def last(self) -> dict:
        """The last record that is whole; with step 0 and time 0 if there is none."""
        record = {"step": 0, "time": 0.0}
        with suppress(FileNotFoundError), self._metrics.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 4096))
            for line in reversed(file.read().split(b"\n")):
                with suppress(json.JSONDecodeError):
                    return record | json.loads(line)
        return record

    def place(self, step_seconds: float) -> str:
        """What the run is at: a `save`, a `validation`, or a `step`."""
        if any(self._checkpoints.glob(".step-*.partial")):
            return "save"
        last = self.last()
        due = (last["step"] + 1) % self._interval == 0 and time.time() - last["time"] > 1.5 * step_seconds
        return "validation" if due else "step"


def wait_until(holds: Callable[[], bool], seconds: float) -> None:
    """Until it holds, or for so many seconds."""
    deadline = time.monotonic() + seconds
    while not holds() and time.monotonic() < deadline:
        time.sleep(0.002)


def run_and_kill(seed: int, kills: int, ranks: int, folder: Path, arguments: list[str]) -> dict:
    """Run, killing one drawn rank at drawn places as often as wanted, and then to the end.

    A kill is aimed at a start, or at a step, a save or a validation of a start that has taken its first step.

    Args:
        seed: of what is drawn.
        kills: how often.
        ranks: of the run.
        folder: for what each start prints.
        arguments: of the run.

    Returns:
        Exit codes of the last start, steps and places of the kills, the longest end of a start in seconds, and the
        processes that are left.
    """
    given = dict(argument.removeprefix("--").split("=", 1) for argument in arguments)
    total, run = int(given["training.steps"]), Path(given["training.run_dir"])
    watched = Watched(run, int(given["training.eval_interval"]))
    draw = random.Random(seed)
    sessions: set[int] = set()
    longest_end, step_seconds, starting = 0.0, 0.1, 4.0
    steps_at_kill, places = [], []
    for attempt in range(kills + 1):
        begun, since = time.monotonic(), time.time()
        started = start_ranks(ranks, folder / f"start-{attempt:03d}", arguments)
        sessions |= {rank.pid for rank in started}
        if attempt == kills:
            codes = reap(started, 600)
            break
        done = steps_at_kill[-1] if steps_at_kill else 0
        steps = min(25.0, max(1.0, (attempt + 1) / kills * total - done + 10))  # so that kills last to the end
        aim = draw.choices(PLACES, (1, 4, 3, 3))[0]
        if aim == "start":
            time.sleep(draw.uniform(0.0, starting))
        else:
            wait_until(lambda since=since: watched.last()["time"] > since, SECONDS)
            starting = time.monotonic() - begun
            time.sleep(draw.uniform(0.0, steps * step_seconds))
            wait_until(lambda aim=aim, pace=step_seconds: watched.place(pace) == aim, PATIENCE)
        stepped = watched.last()["time"] > since
        places.append(watched.place(step_seconds) if stepped else "start")
        draw.choice(started).kill()
        killed = time.monotonic()
        codes = reap(started, SECONDS)
        longest_end = max(longest_end, time.monotonic() - killed)
        last = watched.last()
        steps_at_kill.append(last["step"])
        step_seconds = last.get("step_seconds", step_seconds)  # learn how fast this machine is
    deadline = time.monotonic() + 30
    while alive_in(sessions) and time.monotonic() < deadline:
        time.sleep(0.5)
    return {
        "codes": codes,
        "steps_at_kill": steps_at_kill,
        "places": dict(Counter(places)),
        "longest_end": longest_end,
        "left": alive_in(sessions),
    }
