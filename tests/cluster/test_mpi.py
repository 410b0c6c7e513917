"""The scripts of examples/mpi under the two MPIs that are packaged for Python."""

import os
import signal
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from tests import REPOSITORY
from tests.cluster.runs import TWO_BY_TWO, assert_same_run, long_arguments, losses, one_process, starts, steps
from tests.cluster.virtual_cluster import wait_for
from tests.finished_runs import contents, tiny_arguments

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

OPTIONS = {"openmpi": "--allow-run-as-root --oversubscribe", "mpich": ""}


@pytest.fixture(scope="module", params=["openmpi", "mpich"])
def mpi(request, tmp_path_factory) -> dict[str, str]:
    """Environment with one MPI and this package's own: two cannot be in one."""
    folder = tmp_path_factory.mktemp(request.param)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    python = folder / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "mpi4py>=4,<5", request.param]
    subprocess.run(pip, check=True)
    own = subprocess.run([python, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])"], **CAPTURE).stdout
    # found after what the new environment has itself, mpi4py among it
    Path(own.strip(), "packages.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    return os.environ | {
        "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
        "PYTHON": str(python),
        "PYTHONPATH": str(REPOSITORY),
        "OMP_NUM_THREADS": "1",
        "MPIRUN_OPTIONS": OPTIONS[request.param],
        "CUDA_VISIBLE_DEVICES": "",
    }


CAPTURE = {"check": True, "capture_output": True, "text": True}


def script(name: str, environment: dict[str, str], ranks: int, arguments: list) -> str:
    done = subprocess.run(
        [REPOSITORY / "examples" / "mpi" / name, *map(str, arguments)],
        env=environment | {"RANKS": str(ranks)},
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def test_training(mpi, corpus, tmp_path):
    one_process(tiny_arguments(corpus, tmp_path / "alone"))
    output = script("train.sh", mpi, 4, tiny_arguments(corpus, tmp_path / "run", **TWO_BY_TWO))
    assert "4 ranks: 2 tensor × 2 data × 1 pipeline" in output
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "alone"), rel=1e-5)


def test_preprocessing(mpi, corpus, tmp_path):
    arguments = ["--input", corpus.text, corpus.text.with_name("cmd.py"), "--tokenizer", corpus.tokenizer]
    one_process([*arguments, "--output-prefix", tmp_path / "one" / "corpus"], "tools/preprocess_data.py")
    script("preprocess.sh", mpi, 2, [*arguments, "--output-prefix", tmp_path / "two" / "corpus"])
    assert contents(tmp_path / "two") == contents(tmp_path / "one")


def test_training_that_is_told_to_leave_loses_nothing(mpi, corpus, tmp_path):
    whole, run = tmp_path / "whole", tmp_path / "run"
    script("train.sh", mpi, 4, long_arguments(corpus, whole))
    arguments = long_arguments(corpus, run, data__num_workers=1)
    with (tmp_path / "output").open("w+") as output:
        first = subprocess.Popen(
            [REPOSITORY / "examples" / "mpi" / "train.sh", *map(str, arguments)],
            env=mpi | {"RANKS": "4"},
            cwd=REPOSITORY,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        wait_for(lambda: steps(run) >= 8, 120, lambda: (tmp_path / "output").read_text())
        first.send_signal(signal.SIGUSR1)
        assert first.wait(timeout=60) == 75, (tmp_path / "output").read_text()
    script("train.sh", mpi, 4, arguments)
    before, after = starts(run)
    assert (before["step"], before["previous"]) == (0, None)
    assert (8 <= after["step"] < 40, after["previous"]) == (True, "SIGUSR1")
    assert_same_run(run, whole)


RANK = """
import signal, sys, time
signal.signal(signal.SIGUSR1, lambda *_: sys.exit(75))
print("up", flush=True)
time.sleep(30)
"""


def test_a_signal_to_mpirun_reaches_the_ranks_and_their_code_comes_back(mpi, tmp_path):
    (tmp_path / "rank.py").write_text(RANK)
    options = mpi["MPIRUN_OPTIONS"].split()
    command = ["mpirun", *options, "-np", "2", mpi["PYTHON"], str(tmp_path / "rank.py")]
    run = subprocess.Popen(["/usr/bin/env", *command], env=mpi, stdout=subprocess.PIPE, text=True)
    assert run.stdout.read(6).split() in (["up", "up"], ["upup"])  # MPICH may put the line ends together
    run.send_signal(signal.SIGUSR1)
    run.communicate(timeout=20)
    assert run.returncode == 75
