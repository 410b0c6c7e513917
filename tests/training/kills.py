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
from pathlib import Path

import deepspeed  # noqa: F401, before ranks are forked

import pretrain_ponder
from megatron_ponder.training import trainer  # noqa: F401, as above
from megatron_ponder.training.metrics import read_metrics
from tests.distributed import free_port

TOKENS = 16  # of a sample
SECONDS = 60  # within which the others must end when one is killed


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


def main() -> None:
    """Run, killing one drawn rank after a drawn time as often as wanted, and then to the end."""
    seed, kills, ranks = (int(argument) for argument in sys.argv[1:4])
    folder, arguments = Path(sys.argv[4]), sys.argv[5:]
    run_dir = Path(next(a.partition("=")[2] for a in arguments if a.startswith("--training.run_dir=")))
    draw = random.Random(seed)
    sessions: set[int] = set()
    longest_end, step_seconds, starting = 0.0, 0.1, 4.0
    total = int(next(a.partition("=")[2] for a in arguments if a.startswith("--training.steps=")))
    steps_at_kill = []
    for attempt in range(kills + 1):
        port, output = free_port(), folder / f"start-{attempt:03d}"
        begun = time.monotonic()
        children = [fork_rank(rank, ranks, port, output, arguments) for rank in range(ranks)]
        sessions |= set(children)
        if attempt == kills:
            codes = reap(children, 600)
            break
        done = steps_at_kill[-1] if steps_at_kill else 0
        steps = min(25.0, max(1.0, (attempt + 1) / kills * total - done + 10))  # so that kills last to the end
        if draw.random() < 0.2:  # while it starts
            time.sleep(draw.uniform(0.0, starting))
        else:
            while not (output.exists() and "ready after" in output.read_text()) and time.monotonic() - begun < SECONDS:
                time.sleep(0.02)
            starting = time.monotonic() - begun
            time.sleep(draw.uniform(0.0, steps * step_seconds))
        victim = draw.choice(children)
        os.kill(victim, signal.SIGKILL)
        killed = time.monotonic()
        codes = reap(children, SECONDS)
        longest_end = max(longest_end, time.monotonic() - killed)
        records = read_metrics(run_dir) if (run_dir / "metrics.jsonl").exists() else []
        steps_at_kill.append(records[-1]["step"] if records else 0)
        if records:  # learn how fast this machine is
            step_seconds = records[-1]["samples"] / records[-1]["step"] * TOKENS / records[-1]["tokens_per_second"]
    deadline = time.monotonic() + 30
    while alive_in(sessions) and time.monotonic() < deadline:
        time.sleep(0.5)
    print(
        json.dumps(
            {
                "codes": codes,
                "steps_at_kill": steps_at_kill,
                "longest_end": longest_end,
                "left": alive_in(sessions),
            }
        )
    )


if __name__ == "__main__":
    main()
