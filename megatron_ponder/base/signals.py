"""Signals that ask a run to stop. Imports nothing heavy, so that an entry point can hold them before all else."""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager

SIGNALS = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)
# A launcher that passes Ctrl-C on makes two of one.
SECONDS_OF_ONE_CTRL_C = 2.0


class StopSignals:
    """Notes SIGUSR1, SIGTERM and SIGINT, for the training loop to look at; a second SIGINT kills.

    Use as a context manager, before the imports that take seconds: what arrives earlier ends the process at once.
    Without entering it nothing is ever noted.

    Attributes:
        received: the name of the first signal; None before.
        created: when this object was made, on the monotonic clock.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self.created = time.monotonic()
        self._interrupted: float | None = None
        self._before = {}

    def __enter__(self) -> "StopSignals":
        self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _) -> None:
        now = time.monotonic()
        if number == signal.SIGINT:
            if self._interrupted is not None and now - self._interrupted > SECONDS_OF_ONE_CTRL_C:
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            self._interrupted = self._interrupted or now
        self.received = self.received or signal.Signals(number).name


@contextmanager
def hold_signals() -> Iterator[None]:
    """What this thread starts inside the block, programs and threads, never gets `SIGNALS`; it heeds them afterwards.

    For work of other programs that this process depends on: a terminal and SLURM send a signal to all of them. Another
    thread of this process may still take one inside the block, which is then noted at once.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
