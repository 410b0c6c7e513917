"""torchrun as jobs start it: real agents, whose ranks hear of signals and are asked for their exit code."""

import signal
import subprocess
import sys

import pytest

from tests.cluster.conftest import REPOSITORY
from tests.distributed import free_port

RANK = """
import os, signal, sys, time
def save(number, _):
    for other in (signal.SIGUSR1, signal.SIGTERM):  # from the agent, when another rank has ended
        signal.signal(other, signal.SIG_IGN)
    print("rank", os.environ["RANK"], "saves", flush=True)
    time.sleep(float(os.environ["RANK"]))  # one after the other, as ranks end
    sys.exit(75)
signal.signal(signal.SIGUSR1, save)
signal.signal(signal.SIGTERM, save)
print("up", flush=True)
if sys.argv[1:] == ["wait"]:
    time.sleep(60)
sys.exit(int(sys.argv[1 + int(os.environ["RANK"])]))
"""


@pytest.fixture
def agents(tmp_path):
    """Starts an agent for each node, of two ranks each."""
    (tmp_path / "rank.py").write_text(RANK)
    started = []

    def start(*arguments: str, nodes: int = 1) -> list[subprocess.Popen]:
        meeting = f"--rdzv-endpoint=127.0.0.1:{free_port()}"
        command = [sys.executable, str(REPOSITORY / "tools" / "torchrun.py"), f"--nnodes={nodes}", "--nproc-per-node=2"]
        command += ["--rdzv-backend=c10d", meeting, "--rdzv-id=test", str(tmp_path / "rank.py"), *arguments]
        for _ in range(nodes):
            started.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
        return started

    yield start
    for agent in started:
        agent.kill()
        agent.communicate()


@pytest.mark.parametrize("number", [signal.SIGUSR1, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_ranks_are_told_and_end_by_themselves(agents, number):
    (agent,) = agents("wait")
    assert [agent.stdout.readline() for _ in range(2)] == ["up\n"] * 2
    agent.send_signal(number)
    output, _ = agent.communicate(timeout=30)
    assert sorted(output.splitlines()) == ["rank 0 saves", "rank 1 saves"]
    assert agent.returncode == 75


@pytest.mark.slow
@pytest.mark.parametrize(("codes", "expected"), [(("0", "0"), 0), (("2", "2"), 2), (("75", "75"), 75)])
def test_the_exit_code_is_that_of_the_ranks(agents, codes, expected):
    (agent,) = agents(*codes)
    agent.communicate(timeout=30)
    assert agent.returncode == expected


@pytest.mark.slow
def test_agents_of_two_nodes(agents):
    both = agents("wait", nodes=2)
    for agent in both:
        assert [agent.stdout.readline() for _ in range(2)] == ["up\n"] * 2
        agent.send_signal(signal.SIGUSR1)
    for agent in both:
        agent.communicate(timeout=30)
        assert agent.returncode == 75
