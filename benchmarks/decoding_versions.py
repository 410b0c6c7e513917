"""Decoding on a CPU by this copy of the repository beside another one, at one sequence and at many.

    git worktree add ../before COMMIT
    python benchmarks/decoding_versions.py ../before [--batches 1 16 256] [--rounds 7] [--threads 1] [--dtype fp32]

llama of nine million parameters, adaptive, random weights. Each copy has a process of its own in which every batch goes
on generating; the two take turns. Ratios are medians over rounds of wall seconds, and of the processor's seconds, which
others on the machine disturb less; below 1 is faster now. With them, the most memory that each process had.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

HERE = Path(__file__).resolve().parents[1]
WORKER = """
import json, sys, time
sys.path.insert(0, sys.argv[1])
import torch
from benchmarks.generation import Stream, build
from benchmarks.measuring import resident
torch.set_num_threads(int(sys.argv[2]))
model = build("adaptive", torch.device("cpu"))[0].to(getattr(torch, sys.argv[3]))
streams = {batch: Stream(model, batch) for batch in json.loads(sys.argv[4])}
for line in sys.stdin:
    batch, forwards = json.loads(line)
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(forwards):
        streams[batch].generator.step()
    print(json.dumps([time.perf_counter() - wall, time.process_time() - cpu, resident("VmHWM")]), flush=True)
"""
DTYPES = {"fp32": "float32", "bf16": "bfloat16"}


class Copy:
    """A process that generates with one copy of the repository."""

    def __init__(self, folder: Path, arguments: argparse.Namespace) -> None:
        command = [sys.executable, "-c", WORKER, str(folder.resolve()), str(arguments.threads)]
        command += [DTYPES[arguments.dtype], json.dumps(arguments.batches)]
        environment = os.environ | {"PYTHONPATH": str(folder.resolve())}
        self._folder = folder
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self._process = subprocess.Popen(command, cwd=folder, env=environment, **pipes)

    def __call__(self, batch: int, forwards: int) -> list[float]:
        """Wall seconds, the processor's seconds and the most bytes so far; exits if the copy has ended."""
        try:
            print(json.dumps([batch, forwards]), file=self._process.stdin, flush=True)
            return json.loads(self._process.stdout.readline())
        except (BrokenPipeError, json.JSONDecodeError):
            sys.exit(f"the copy in {self._folder} does not generate; what it wrote above says why")

    def close(self) -> None:
        """End the process."""
        self._process.stdin.close()
        self._process.wait()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path, help="the other copy")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16, 256])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    arguments = parser.parse_args()
    before, now = copies = [Copy(folder, arguments) for folder in (arguments.before, HERE)]
    table = Table(title=f"decoding, {arguments.dtype}: now over before")
    for heading in ("sequences", "ms a forward before", "now", "wall", "processor", "memory"):
        table.add_column(heading, justify="right")
    for batch in arguments.batches:
        forwards = max(4, 256 // batch)
        rounds = [(before(batch, forwards), now(batch, forwards)) for _ in range(arguments.rounds + 1)][1:]
        times = [f"{1e3 * statistics.median(pair[which][0] for pair in rounds) / forwards:.2f}" for which in (0, 1)]
        ratios = [f"{statistics.median(new[at] / old[at] for old, new in rounds):.2f}" for at in (0, 1, 2)]
        table.add_row(str(batch), *times, *ratios)
    Console(width=100).print(table)
    for copy in copies:
        copy.close()


if __name__ == "__main__":
    main()
