"""A process ends with its code and after its exit handlers, and what would be destroyed after them is not."""

import subprocess
import sys

import pytest

PROGRAM = """
import atexit, os, sys, threading, time

from megatron_ponder.base.ending import run_to_the_end


class Trap:
    def __del__(self):
        os.abort()


def main():
    global trap
    atexit.register(print, "handler")
    threading.Thread(target=lambda: (time.sleep(0.2), print("thread"))).start()
    trap = Trap()  # destroyed with the interpreter
    print("main")
    {last}


{run}
"""


def run(last: str, how: str = "run_to_the_end(main)") -> tuple[int, list[str], str]:
    """Exit code, lines and errors of the program whose main function ends with the given statement."""
    program = [sys.executable, "-c", PROGRAM.format(last=last, run=how)]
    done = subprocess.run(program, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout.split(), done.stderr


def test_the_trap_is_one():
    assert run("pass", "main()")[0] < 0


@pytest.mark.parametrize(
    ("last", "code"),
    [
        ("pass", 0),
        ("sys.exit()", 0),
        ("sys.exit(0)", 0),
        ("sys.exit(75)", 75),
        ("sys.exit('what is wrong')", 1),
        ("raise RuntimeError('what is wrong')", 1),
        ("raise KeyboardInterrupt('what is wrong')", 130),
    ],
)
def test_the_process_ends_after_threads_and_handlers_with_its_code(last, code):
    ended, lines, errors = run(last)
    assert (ended, lines) == (code, ["main", "thread", "handler"])
    assert ("what is wrong" in errors) == ("what is wrong" in last)


def test_nobody_left_to_print_for_does_not_matter():
    assert run("sys.stdout.close()")[0] == 0


MPI = """
import sys, types

from megatron_ponder.base.ending import run_to_the_end

module = types.ModuleType("mpi4py.MPI")
module.Is_initialized, module.Is_finalized = lambda: {initialized}, lambda: {finalized}
module.Finalize = lambda: print("finalized")
sys.modules["mpi4py.MPI"] = module
run_to_the_end(lambda: None)
"""


@pytest.mark.parametrize(("initialized", "finalized"), [(True, False), (False, False), (True, True)])
def test_mpi_is_ended_where_it_has_begun(initialized, finalized):
    program = [sys.executable, "-c", MPI.format(initialized=initialized, finalized=finalized)]
    done = subprocess.run(program, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.split()) == (0, ["finalized"] if initialized and not finalized else [])
