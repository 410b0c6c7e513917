"""What a user is told when something they gave cannot work."""

import functools
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress

from megatron_ponder.base import streams, versions

# A run that has saved its state and can go on from it (EX_TEMPFAIL of sysexits.h); the same command resumes it.
EXIT_PREEMPTED = 75
# A rank in which nothing has happened for too long.
EXIT_HUNG = 76
# Nobody reads what a command prints: 128 + SIGPIPE.
EXIT_NOT_READ = 141
# Launchers end the other ranks as soon as one ends; the one that reports must come first.
SECONDS_FOR_THE_REPORT = 5.0


class UserError(ValueError):
    """Something the user gave cannot work. The message is one line that says what to do about it.

    Attributes:
        shared: every rank raises this same error, so that one rank's report is enough.
    """

    def __init__(self, message: str, shared: bool = False) -> None:
        super().__init__(message)
        self.shared = shared


class Preempted(Exception):  # noqa: N818, it is no error
    """A run has stopped before its end, on every rank, with its state saved. The message says why and how to go on.

    Attributes:
        reason: a signal's name, or what else asked it to stop.
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


# What a user can do something about.
USERS = (UserError, OSError, UnicodeEncodeError)


def command_line(argv: Sequence[str] | None) -> list[str]:
    """Words of a command line after the program's name: those given, or those that this process was started with."""
    return sys.argv[1:] if argv is None else list(argv)


def command(main: Callable[[Sequence[str]], None]) -> Callable[..., None]:
    """Decorate the main function of a command: a `UserError` or an I/O error becomes one line on stderr, exit code 2.

    It is called with the words of a command line, or without any for those that this process was started with. Text
    that cannot be UTF-8, of which none is taken there, is such an error, before any work is done.

    Versions of packages outside the ranges that the tests ran on are named in a warning, on rank 0.

    `Preempted` becomes exit code 75, without a word, because whoever raises it has said so on rank 0. A reader of
    standard output that has gone, such as `head`, ends the command without a word too, with the code that shells give.

    Any other exception keeps its traceback, because it is a bug and not the user's doing. Set `PONDER_TRACEBACK=1` to
    see the traceback of a `UserError` too.
    """

    @functools.wraps(main)
    def run(argv: Sequence[str] | None = None) -> None:
        streams.prepare()
        words = command_line(argv)
        try:
            for word in words:
                word.encode("utf-8")
            _warn_of_versions()
            main(words)
            sys.stdout.flush()
        except Preempted:
            sys.exit(EXIT_PREEMPTED)
        except USERS as error:
            if _tracebacks_wanted():
                raise
            sys.exit(_tell(error))

    return run


def report(error: BaseException) -> int:
    """Say on standard error what ends this process, in a line if a user can do something about it.

    Returns:
        The exit code that goes with it.
    """
    if isinstance(error, USERS) and not _tracebacks_wanted():
        return _tell(error)
    if isinstance(error, KeyboardInterrupt):
        return 128 + signal.SIGINT
    with suppress(OSError):
        traceback.print_exception(error)
    return 1


def _tracebacks_wanted() -> bool:
    return os.environ.get("PONDER_TRACEBACK") == "1"


def _tell(error: Exception) -> int:
    """One line, on every rank that has an error of its own, and the exit code."""
    if isinstance(error, BrokenPipeError) and streams.reader_is_gone():
        streams.give_up_output()
        return EXIT_NOT_READ
    rank = _rank()
    if rank == 0 or not getattr(error, "shared", False):
        who = f"rank {rank}: " if rank else ""
        with suppress(OSError):  # what cannot be said is no other error
            print(f"{who}error: {describe(error)}", file=sys.stderr, flush=True)
    elif _first_number("WORLD_SIZE", "SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", default=1) > 1:
        time.sleep(SECONDS_FOR_THE_REPORT)
    if isinstance(error, OSError):
        _try_output()
    return 2


def warn(message: str) -> None:
    """Print a warning of one line on standard error, on rank 0 alone; what cannot be said is no error."""
    if _rank() == 0:
        with suppress(OSError):
            print(f"warning: {message}", file=sys.stderr, flush=True)


def _warn_of_versions() -> None:
    others = versions.outside() if _rank() == 0 else []
    if others:
        warn(
            f"{', '.join(others)}: outside the versions that the tests ran on; should something fail, "
            "install one of those first"
        )


def _rank() -> int:
    return _first_number("RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "PMI_RANK", default=0)


def _try_output() -> None:
    """Write what is left for standard output, or let it go if that was what went wrong."""
    try:
        sys.stdout.flush()
    except OSError:
        streams.give_up_output()


def _first_number(*names: str, default: int) -> int:
    """The number in the first of these environment variables that has one; `environment.py` refuses what is none."""
    values = (os.environ.get(name, "").strip() for name in names)
    return next((int(value) for value in values if re.fullmatch(r"[0-9]{1,10}", value)), default)


def describe(error: Exception) -> str:
    """One line for an error, with the file's name and a hint where the operating system's own words are terse."""
    if isinstance(error, UnicodeEncodeError):
        part = error.object[max(0, error.start - 20) : error.end]
        return f"{part!a} cannot be written as {error.encoding}: leave out or replace {part[-1]!a}"
    if not isinstance(error, OSError) or error.errno is None:
        return " ".join(str(error).split())
    name = f" ({error.filename})" if error.filename else ""
    hints = {
        28: "free some space or choose another folder",  # ENOSPC
        13: "choose a folder that you may write to, or change its permissions",  # EACCES
        30: "choose a folder on a writable file system",  # EROFS
        2: "check the path",  # ENOENT
        17: "choose another folder, or remove the file that has its name",  # EEXIST
        20: "a part of the path is a file; choose another folder",  # ENOTDIR
    }
    hint = f"; {hints[error.errno]}" if error.errno in hints else ""
    return f"{error.strerror}{name}{hint}"
