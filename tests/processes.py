"""Processes of tests that start in milliseconds: forked from a server that has imported what they need.

Importing PyTorch and DeepSpeed takes a process seconds, and tests start hundreds. What a test says of a process while
it imports needs `subprocess` all the same.
"""

import atexit
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable, Mapping
from multiprocessing import reduction
from pathlib import Path
from typing import IO

from megatron_ponder.commands.ponder import start
from tests import REPOSITORY

IMPORTED = ["megatron_ponder.training.trainer", "megatron_ponder.commands.generate", "megatron_ponder.commands.serve"]
IMPORTED += ["jsonargparse", "matplotlib.backends.backend_agg", "matplotlib.pyplot", "deepspeed", "tests.distributed"]
# What DeepSpeed imports when it builds an engine, with all of PyTorch's compiler; other versions may have other names.
IMPORTED += ["deepspeed.runtime.zero.muon.muon_optimizer", "deepspeed.module_inject.auto_ep_layer"]
IMPORTED += ["deepspeed.comm.mori", "pytest", "tests.warm"]
# Where a test says nothing else, processes compute on one thread each, and on no GPU.
SMALL = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def server() -> multiprocessing.context.BaseContext:
    """What starts processes by forking, of which all that a process of pytest starts share one."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    multiprocessing.set_forkserver_preload(IMPORTED)
    return multiprocessing.get_context("forkserver")


def free_port() -> int:
    """A TCP port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def environments(ranks: int) -> list[dict[str, str]]:
    """Of each rank, the environment that a launcher gives it on this machine."""
    shared = {"WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    places = [shared | {"RANK": rank, "LOCAL_RANK": rank} for rank in range(ranks)]
    return [os.environ | {name: str(value) for name, value in place.items()} for place in places]


class Forked:
    """A `ponder` command in a process of its own, with what tests use of `subprocess.Popen`.

    Attributes:
        pid: its number.
        stdout, stderr: what it writes, where that was to be a pipe.
    """

    def __init__(
        self,
        *words: object,
        program: Callable[[], None] = start,
        env: Mapping[str, str] | None = None,
        cwd: Path = REPOSITORY,
        stdin: IO | None = None,
        stdout: IO | int | None = None,
        stderr: IO | int | None = None,
    ) -> None:
        """Start it.

        Args:
            words: of its command line, after `ponder`.
            program: what it runs; at the top level of an importable module.
            env: environment variables; those of now unless given.
            cwd: folder in which it runs.
            stdin: what it reads; nothing unless given.
            stdout, stderr: a file, or `subprocess.PIPE`, or for errors `subprocess.STDOUT`; nowhere unless given.
        """
        ends, files = [], []
        self.stdout = self.stderr = None
        with open(os.devnull, "r+b") as nowhere:
            for name, wanted in (("stdin", stdin), ("stdout", stdout), ("stderr", stderr)):
                if wanted == subprocess.PIPE:
                    read, write = os.pipe()
                    setattr(self, name, open(read, encoding="utf-8"))  # noqa: SIM115
                    ends.append(write)
                    files.append(_Descriptor(write))
                elif wanted == subprocess.STDOUT:
                    files.append(files[-1])
                else:
                    files.append(_Descriptor((wanted or nowhere).fileno()))
            arguments = (
                program,
                ["ponder", *map(str, words)],
                dict(os.environ if env is None else env) | SMALL,
                cwd,
                files,
            )
            self._process = server().Process(target=_become, args=arguments)
            self._process.start()
        for end in ends:
            os.close(end)
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        """The exit code, negative of a signal; None while it runs."""
        return self._process.exitcode

    def poll(self) -> int | None:
        """The same."""
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """The exit code, in the end.

        Raises:
            subprocess.TimeoutExpired: it takes longer than `timeout` seconds.
        """
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired("ponder", timeout)
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str | None, str | None]:
        """What it has written to pipes, in the end; nothing but a few kilobytes to errors."""
        written = tuple(None if stream is None else stream.read() for stream in (self.stdout, self.stderr))
        self.wait(timeout)
        return written

    def send_signal(self, number: int) -> None:
        """Send a signal, unless it has ended."""
        if self.returncode is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """Send SIGKILL, unless it has ended."""
        self.send_signal(signal.SIGKILL)


def script(text: str, *words: object, env: Mapping[str, str] | None = None) -> subprocess.CompletedProcess:
    """What became of a script in a process of its own, where its words stand after its name, with what it has printed.

    Args:
        text: Python.
        words: it reads them in `sys.argv`.
        env: environment variables; those of now unless given.
    """
    process = Forked(text, *words, program=_run_script, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    out, errors = process.communicate()
    return subprocess.CompletedProcess(words, process.returncode, out, errors)


def _run_script() -> None:
    text = sys.argv.pop(1)
    exec(compile(text, "script", "exec"), {"__name__": "__main__"})


class _Descriptor:
    """An open file that travels to a forked process."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __reduce__(self) -> tuple:
        return _arrived, (reduction.DupFd(self.number),)


def _arrived(descriptor: reduction.DupFd) -> _Descriptor:
    return _Descriptor(descriptor.detach())


def _become(program: Callable[[], None], argv: list[str], env: dict, cwd: Path, files: list[_Descriptor]) -> None:
    """Be the process of a program, from its streams to its exit code."""
    for number, file in enumerate(files):
        os.dup2(file.number, number)
    for file in set(files):
        os.close(file.number)
    sys.stdin, sys.stdout, sys.stderr = (
        open(number, mode, encoding="utf-8", closefd=False, buffering=buffering)  # noqa: SIM115
        for number, (mode, buffering) in enumerate((("r", -1), ("w", -1), ("w", 1)))
    )
    os.setsid()
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    sys.argv = argv
    for handler in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):  # also where the tests run under nohup
        signal.signal(handler, signal.default_int_handler if handler == signal.SIGINT else signal.SIG_DFL)
    code = 0
    try:
        program()
    except SystemExit as stop:
        code = stop.code or 0
    except BaseException:
        traceback.print_exc()
        code = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    os._exit(code)
