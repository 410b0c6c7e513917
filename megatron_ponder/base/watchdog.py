"""A rank that hangs says where, and ends, so that its launcher can end the others."""

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager

from megatron_ponder.base.errors import EXIT_HUNG

# A step may take so many times as long as the longest before, however short the limit is.
SLOWER = 10


class Watchdog:
    """Ends this process when nothing has been done for too long, after the stacks of all its threads.

    It begins with the first `beat`, so that what comes before may take as long as it likes; a beat says that work goes
    on. Time in which the whole process was stopped, as a suspended job is, does not count.

    Use as a context manager around the work.
    """

    def __init__(
        self, limit: float, option: str = "training.step_timeout", farewell: Callable[[], None] | None = None
    ) -> None:
        """Watch.

        Args:
            limit: seconds between two beats, unless ten times the longest that there has been is more; 0 watches not.
            option: that sets the limit.
            farewell: what to do, in the watching thread, before this process ends.
        """
        self._limit, self._option, self._farewell = limit, option, farewell
        self._last: float | None = None
        self._longest = 0.0
        self._paused = False
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        if self._limit > 0:
            self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._done.set()

    def beat(self) -> None:
        """Something has been done; says nothing in work that is not watched."""
        if self._paused:
            return
        now = time.monotonic()
        if self._last is not None:
            self._longest = max(self._longest, now - self._last)
        self._last = now

    @contextmanager
    def paused(self):
        """Work that may take as long as it likes, and says nothing about how long a step takes."""
        self._paused = True
        try:
            yield
        finally:
            if self._last is not None:
                self._last = time.monotonic()
            self._paused = False

    def _watch(self) -> None:
        interval = min(1.0, self._limit / 10)
        looked = time.monotonic()
        while not self._done.wait(interval):
            now = time.monotonic()
            stopped, looked = now - looked - interval, now
            if self._last is None:
                continue
            if stopped > interval:
                self._last += stopped
            allowed = max(self._limit, SLOWER * self._longest)
            if not self._paused and now - self._last > allowed:
                print(
                    f"rank {os.environ.get('RANK', '0')}: nothing has happened for {allowed:.0f} seconds "
                    f"({self._option}); its threads are at",
                    file=sys.stderr,
                    flush=True,
                )
                faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
                sys.stderr.flush()
                if self._farewell is not None:
                    self._farewell()
                os._exit(EXIT_HUNG)
