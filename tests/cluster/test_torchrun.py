"""torchrun as jobs start it: real agents, whose ranks hear of signals and are asked for their exit code."""

import os
import signal
import subprocess
import sys

import pytest

from tests import REPOSITORY
from tests.cluster.daemons import wait_for
from tests.cluster.runs import LONG, losses, one_process, steps
from tests.finished_runs import catches, tiny_arguments
from tests.processes import free_port

RANK = """
import os, signal, sys, time
def save(number, _):
    for other in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):  # from the agent, when another rank has ended
        signal.signal(other, signal.SIG_IGN)
    os.write(1, f"rank {os.environ['RANK']} saves\\n".encode())  # whole, although both write
    time.sleep(float(os.environ["RANK"]))  # one after the other, as ranks end
    sys.exit(75)
signal.signal(signal.SIGUSR1, save)
signal.signal(signal.SIGTERM, save)
signal.signal(signal.SIGINT, save)
os.write(1, b"up\\n")
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
        port = free_port()
        command = [sys.executable, str(REPOSITORY / "tools" / "torchrun.py"), f"--nnodes={nodes}", "--nproc-per-node=2"]
        command += ["--master-addr=127.0.0.1", f"--master-port={port}", str(tmp_path / "rank.py"), *arguments]
        for node in range(nodes):
            environment = os.environ | {"SLURM_NODEID": str(node)}
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
            started.append(subprocess.Popen(command, env=environment, **pipes))
        return started

    yield start
    for agent in started:
        agent.kill()
        agent.communicate()


@pytest.mark.parametrize(
    "number", [signal.SIGUSR1, signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)]
)
def test_ranks_are_told_and_end_by_themselves(agents, number):
    (agent,) = agents("wait")
    assert [agent.stdout.readline() for _ in range(2)] == ["up\n"] * 2
    agent.send_signal(number)
    output, complaints = agent.communicate(timeout=30)
    assert sorted(output.splitlines()) == ["rank 0 saves", "rank 1 saves"]
    assert agent.returncode == 75
    assert "Traceback" not in complaints


@pytest.mark.slow
@pytest.mark.parametrize(("codes", "expected"), [(("0", "0"), 0), (("2", "2"), 2), (("75", "75"), 75)])
def test_the_exit_code_is_that_of_the_ranks(agents, codes, expected):
    (agent,) = agents(*codes)
    agent.communicate(timeout=30)
    assert agent.returncode == expected


def test_a_signal_before_there_are_ranks_ends_as_if_they_had_saved(agents):
    (agent,) = agents("wait")
    wait_for(lambda: catches(agent.pid, signal.SIGUSR1), 30, lambda: "a handler")
    agent.send_signal(signal.SIGUSR1)
    agent.communicate(timeout=60)
    assert agent.returncode == 75


@pytest.mark.slow
def test_agents_of_two_nodes(agents):
    both = agents("wait", nodes=2)
    for agent in both:
        assert [agent.stdout.readline() for _ in range(2)] == ["up\n"] * 2
        agent.send_signal(signal.SIGUSR1)
    for agent in both:  # the first, whose ranks end first, is where nodes meet
        agent.communicate(timeout=30)
        assert agent.returncode == 75


@pytest.mark.slow
def test_the_script_for_one_node(corpus, tmp_path):
    run, alone = tmp_path / "run", tmp_path / "alone"
    arguments = [*tiny_arguments(corpus, run, **LONG), "--parallel.tensor=2"]
    environment = os.environ | {"RANKS": "2", "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    command = [REPOSITORY / "examples" / "single_node" / "train.sh", *arguments]
    first = subprocess.Popen(command, cwd=REPOSITORY, env=environment, stdout=subprocess.PIPE, text=True)
    wait_for(lambda: steps(run) >= 8, 120, lambda: "eight steps")
    first.send_signal(signal.SIGUSR1)
    output, _ = first.communicate(timeout=60)
    assert "stopped at step" in output
    assert first.returncode == 75
    assert steps(run) < 40
    subprocess.run(command, cwd=REPOSITORY, env=environment, check=True, timeout=200)
    one_process(tiny_arguments(corpus, alone, **LONG))
    assert losses(run) == pytest.approx(losses(alone), rel=1e-5)
