"""How the process of a rank ends."""

import atexit
import contextlib
import os
import sys
from collections.abc import Callable


def run_to_the_end(main: Callable[[], None]) -> None:
    """Run a program's main function, and let the process end when all exit handlers have run.

    DeepSpeed holds on to process groups for as long as there is an interpreter, so that gloo's threads still run while
    that takes itself apart; it can then abort, after all work is done. So it is not taken apart.

    Call it before any other exit handler is registered, because handlers run from the last to the first.
    """
    code = 1  # what Python ends with after an exception that nobody has caught

    def leave() -> None:
        mpi = sys.modules.get("mpi4py.MPI")  # ended by what is left out here
        if mpi is not None and mpi.Is_initialized() and not mpi.Is_finalized():
            mpi.Finalize()
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):  # whoever read it has gone, or it is closed
                stream.flush()
        os._exit(code)

    atexit.register(leave)
    try:
        main()
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        raise
    except KeyboardInterrupt:
        code = 130
        raise
