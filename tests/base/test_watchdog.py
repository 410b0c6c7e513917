"""A process in which nothing happens shows where it is and ends; a slow, saving or suspended one does not."""

import os
import signal
import subprocess
import sys
import time

import pytest

from megatron_ponder.base.errors import EXIT_HUNG
from tests.finished_runs import tiny_arguments
from tests.training.test_failures import start_ranks, wait_for

HANG = """
import time
from megatron_ponder.base.watchdog import Watchdog

def hang_here():
    time.sleep(60)

with Watchdog(0.5) as watchdog:
    watchdog.beat()
    watchdog.beat()
    hang_here()
"""
WORK = """
import time
from megatron_ponder.base.watchdog import Watchdog

with Watchdog(1.0) as watchdog:
    time.sleep(1.5)  # before the first beat
    watchdog.beat()
    with watchdog.paused():
        time.sleep(1.5)
    print("working", flush=True)
    for _ in range(20):
        time.sleep(0.1)
        watchdog.beat()
    time.sleep(0.7)
with Watchdog(0) as watchdog:
    watchdog.beat()
    time.sleep(0.3)
"""


def test_a_process_that_hangs_shows_where_and_ends():
    environ = os.environ | {"RANK": "3"}
    done = subprocess.run([sys.executable, "-c", HANG], capture_output=True, text=True, check=False, env=environ)
    assert done.returncode == EXIT_HUNG
    assert "rank 3: nothing has happened for" in done.stderr
    assert "in hang_here" in done.stderr


def test_a_suspended_process_goes_on():
    process = subprocess.Popen([sys.executable, "-c", WORK], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "working\n"
    process.send_signal(signal.SIGSTOP)
    time.sleep(2.5)
    process.send_signal(signal.SIGCONT)
    assert process.wait(30) == 0


@pytest.mark.slow
def test_a_rank_that_hangs_takes_the_others_with_it(corpus, tmp_path):
    """Stopped, so that it cannot even end itself, which is left to the launcher."""
    settings = {"training__steps": 10**6, "training__step_timeout": 5, "logging__interval": 1}
    processes = start_ranks(tiny_arguments(corpus, tmp_path / "run", **settings), 2, tmp_path, failing=None)
    wait_for(lambda: "step 2/" in (tmp_path / "rank-0").read_text(), processes, seconds=180)
    processes[1].send_signal(signal.SIGSTOP)
    try:
        assert processes[0].wait(60) == EXIT_HUNG
    finally:
        for process in processes:
            process.kill()
            process.wait()
    output = (tmp_path / "rank-0").read_text()
    assert "rank 0: nothing has happened for" in output
    assert "all_reduce" in output or "backward" in output
