"""Ends that a user asks for, at a moment at which nothing is lost."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def noted_signals() -> Iterator[threading.Event]:
    """Inside the block the first SIGINT or SIGTERM sets the event, and a second one raises KeyboardInterrupt.

    For the main thread.
    """
    received = threading.Event()

    def handle(number: int, frame: object) -> None:
        if received.is_set():
            raise KeyboardInterrupt
        received.set()

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
