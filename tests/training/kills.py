"""A run whose ranks are killed again and again: `python -m tests.training.kills SEED KILLS RANKS FOLDER ARGUMENTS…`.

Prints one JSON object. Ranks are forked from a process that has imported everything, because that takes most of the
time of a start; each has a session of its own, so that whatever a killed one leaves can be found.
"""

import json
import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import deepspeed  # noqa: F401, before ranks are forked

import pretrain_ponder
from megatron_ponder.training import trainer  # noqa: F401, as above
from tests.distributed import free_port

SECONDS = 60  # within which a start takes its first step, and the others end when one is killed
PATIENCE = 20  # seconds for the run to come to where it is to be killed
PLACES = ("start", "step", "save", "validation")


def fork_rank(rank: int, ranks: int, port: int, output: Path, arguments: list[str]) -> int:
    """Start a rank; its process id."""
    child = os.fork()
    if child:
        return child
    code = 70
    try:
        os.setsid()
        file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, 1)
        os.dup2(file, 2)
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
        os.environ.update({key: str(value) for key, value in place.items()}, MASTER_ADDR="127.0.0.1")
        os.environ["MASTER_PORT"] = str(port)
        sys.argv = ["pretrain_ponder.py", *arguments]
        pretrain_ponder.main()
        code = 0
    except SystemExit as stop:
        code = stop.code
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def reap(children: list[int], seconds: float) -> list[int]:
    """Exit codes of ranks that end by themselves within so many seconds."""
    codes: dict[int, int] = {}
    deadline = time.monotonic() + seconds
    while len(codes) < len(children):
        for child in children:
            if child not in codes:
                done, status = os.waitpid(child, os.WNOHANG)
                if done:
                    codes[child] = os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            for child in set(children) - codes.keys():
                os.kill(child, signal.SIGKILL)
            raise TimeoutError(f"ranks were still there after {seconds} s")
        time.sleep(0.02)
    return [codes[child] for child in children]


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


def main() -> None:
    """Run, killing one drawn rank at drawn places as often as wanted, and then to the end.

    A kill is aimed at a start, or at a step, a save or a validation of a start that has taken its first step.
    """
    seed, kills, ranks = (int(argument) for argument in sys.argv[1:4])
    folder, arguments = Path(sys.argv[4]), sys.argv[5:]
    given = dict(argument.removeprefix("--").split("=", 1) for argument in arguments)
    total, run = int(given["training.steps"]), Path(given["training.run_dir"])
    watched = Watched(run, int(given["training.eval_interval"]))
    draw = random.Random(seed)
    sessions: set[int] = set()
    longest_end, step_seconds, starting = 0.0, 0.1, 4.0
    steps_at_kill, places = [], []
    for attempt in range(kills + 1):
        port, output = free_port(), folder / f"start-{attempt:03d}"
        begun, since = time.monotonic(), time.time()
        children = [fork_rank(rank, ranks, port, output, arguments) for rank in range(ranks)]
        sessions |= set(children)
        if attempt == kills:
            codes = reap(children, 600)
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
        victim = draw.choice(children)
        os.kill(victim, signal.SIGKILL)
        killed = time.monotonic()
        codes = reap(children, SECONDS)
        longest_end = max(longest_end, time.monotonic() - killed)
        last = watched.last()
        steps_at_kill.append(last["step"])
        step_seconds = last.get("step_seconds", step_seconds)  # learn how fast this machine is
    deadline = time.monotonic() + 30
    while alive_in(sessions) and time.monotonic() < deadline:
        time.sleep(0.5)
    print(
        json.dumps(
            {
                "codes": codes,
                "steps_at_kill": steps_at_kill,
                "places": dict(Counter(places)),
                "longest_end": longest_end,
                "left": alive_in(sessions),
            }
        )
    )


if __name__ == "__main__":
    main()
