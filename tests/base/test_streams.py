"""What becomes of standard output is no reason to end, nor to say more than a line."""

import os
import subprocess
import sys

import pytest

from megatron_ponder.runs.metrics import read_metrics
from tests import REPOSITORY
from tests.finished_runs import STEPS, tiny_arguments

PRINTS = """
from megatron_ponder.base.errors import command

@command
def main(argv):
    for number in range(int(argv[0])):
        print("naïve ☕", number)
    with open(argv[1], "w") as file:
        file.write("whole")

main()
"""


def run_in(shell: str, lines: int, path, **environment) -> subprocess.CompletedProcess:
    """Run the program by a line for bash, in which $RUN stands for it."""
    run = f'{sys.executable} -c "$PROGRAM" {lines} {path}'
    variables = os.environ | {"PROGRAM": PRINTS, "PYTHONPATH": os.getcwd()} | environment
    line = f"set -o pipefail; {shell.replace('$RUN', run)}"
    return subprocess.run(["bash", "-c", line], env=variables, capture_output=True, text=True, check=False)


def test_a_reader_that_has_gone_ends_a_command_without_a_word(tmp_path):
    done = run_in("$RUN | head -n 1", 10**6, tmp_path / "file")
    assert done.stdout == "naïve ☕ 0\n"
    assert (done.stderr, done.returncode) == ("", 141)


@pytest.mark.parametrize("lines", [1, 10**5], ids=["at the end", "on the way"])
def test_a_full_disk_is_one_line(tmp_path, lines):
    done = run_in("$RUN > /dev/full", lines, tmp_path / "file")
    assert done.stderr == "error: No space left on device; free some space or choose another folder\n"
    assert done.returncode == 2


def test_closed_streams_do_no_harm(tmp_path):
    done = run_in("$RUN <&- >&- 2>&-", 3, tmp_path / "file")
    assert done.returncode == 0
    assert (tmp_path / "file").read_text() == "whole"


def test_characters_that_an_encoding_lacks_are_written_as_escapes(tmp_path):
    done = run_in("$RUN", 1, tmp_path / "file", PYTHONIOENCODING="ascii")
    assert (done.stdout, done.stderr) == ("na\\xefve \\u2615 0\n", "")
    assert done.returncode == 0


@pytest.mark.slow
@pytest.mark.parametrize("redirection", ["| head -n 1", "> /dev/full", ">&- 2>&-"])
def test_a_run_goes_on_to_its_end(corpus, tmp_path, redirection):
    arguments = " ".join(tiny_arguments(corpus, tmp_path / "run"))
    line = f"set -o pipefail; {sys.executable} pretrain_ponder.py {arguments} {redirection}"
    variables = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(["bash", "-c", line], cwd=REPOSITORY, env=variables, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert read_metrics(tmp_path / "run")[-1]["step"] == STEPS
    assert "loss plot in " in (tmp_path / "run" / "train.log").read_text()
