"""Standard output and error that may be closed, full, in another encoding, or a pipe that nobody reads any more."""

import io
import os
import select
import sys


def prepare() -> None:
    """Make the standard streams of this process safe to write any text to, as far as they can be written at all.

    One that was closed becomes the null device, because the next file to be opened would get its number, and what
    libraries print with it. Characters that an encoding does not have are written as escapes.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # which gets the lowest number that is free
    sys.stdout = sys.stdout or open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stderr = sys.stderr or open(2, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def reader_is_gone() -> bool:
    """Whether standard output is a pipe that nobody reads any more, as behind `| head`."""
    try:
        poll = select.poll()
        poll.register(sys.stdout.fileno(), 0)
        return any(event & select.POLLERR for _, event in poll.poll(0))
    except (OSError, ValueError):  # it is no file
        return False


def give_up_output() -> None:
    """Let what could not be written to standard output go, or the end of the process would try again and complain."""
    try:
        number = os.open(os.devnull, os.O_WRONLY)
        os.dup2(number, sys.stdout.fileno())
        os.close(number)
    except (OSError, ValueError):
        return
