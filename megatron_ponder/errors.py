"""What a user is told when something they gave cannot work."""

import functools
import os
import sys
from collections.abc import Callable


class UserError(ValueError):
    """Something the user gave cannot work. The message is one line that says what to do about it.

    Attributes:
        shared: every rank raises this same error, so that one rank's report is enough.
    """

    shared = False


def command(main: Callable[..., None]) -> Callable[..., None]:
    """Decorate the main function of a command: a `UserError` or an I/O error becomes one line on stderr, exit code 2.

    Any other exception keeps its traceback, because it is a bug and not the user's doing. Set `PONDER_TRACEBACK=1` to
    see the traceback of a `UserError` too.
    """

    @functools.wraps(main)
    def run(*args, **kwargs) -> None:
        try:
            main(*args, **kwargs)
        except (UserError, OSError) as error:
            if os.environ.get("PONDER_TRACEBACK") == "1":
                raise
            rank = int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")))
            if rank == 0 or not getattr(error, "shared", False):
                who = f"rank {rank}: " if rank else ""
                print(f"{who}error: {describe(error)}", file=sys.stderr, flush=True)
            sys.exit(2)

    return run


def describe(error: Exception) -> str:
    """One line for an error, with the file's name and a hint where the operating system's own words are terse."""
    if not isinstance(error, OSError) or error.errno is None:
        return " ".join(str(error).split())
    name = f" ({error.filename})" if error.filename else ""
    hints = {
        28: "free some space or choose another folder",  # ENOSPC
        13: "choose a folder that you may write to, or change its permissions",  # EACCES
        30: "choose a folder on a writable file system",  # EROFS
        2: "check the path",  # ENOENT
    }
    hint = f"; {hints[error.errno]}" if error.errno in hints else ""
    return f"{error.strerror}{name}{hint}"
