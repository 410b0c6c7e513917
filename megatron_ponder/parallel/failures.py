"""A rank that fails takes the others with it within seconds, and one traceback says why.

NCCL's kernels wait on the GPU for those of other ranks, and to end a process group in order is to wait for them: a rank
with an error of its own must not. It says so in the store through which the ranks have met, where the others look, and
its process ends as it is.
"""

import os
import sys
import threading
import time
from contextlib import suppress

import torch.distributed as dist

from megatron_ponder.base.errors import USERS, Preempted, report
from megatron_ponder.base.launch import Launch

# Of entries in the store: why a rank has failed, and how many have heard of it.
KEY, HEARD = "failed", "failed, heard"
# Between two looks at the store; and until a rank that has been told ends, should it not end by itself.
INTERVAL, GRACE = 1.0, 2.0
# That the rank whose store it is stays for the others to look.
SECONDS_TO_BE_HEARD = 5.0


class FailureWatch:
    """Ends this process when it, or another rank, fails. Use as a context manager around the work of all ranks.

    An error that all ranks have alike, as `UserError.shared` and `Preempted` are, is no failure, and goes its way.
    """

    def __init__(self, store: dist.Store, launch: Launch) -> None:
        """Prepare.

        Args:
            store: of all ranks.
            launch: the place of this process among them.
        """
        # Of its own, since whoever waits for an entry keeps others from the connection.
        self._store, self._launch = store.clone(), launch
        self._hosts = launch.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        self._done, self._leaving = threading.Event(), threading.Lock()
        self._thread = threading.Thread(target=self._look, name="failures", daemon=True)

    def __enter__(self) -> "FailureWatch":
        self._thread.start()
        return self

    def __exit__(self, _, error: BaseException | None, __) -> None:
        self._done.set()
        if error is not None and not isinstance(error, (Preempted, SystemExit)) and not getattr(error, "shared", False):
            self._fail(error)

    def _look(self) -> None:
        """Look for ranks that have failed, as the thread of the watch."""
        try:
            while not self._done.wait(INTERVAL):
                if self._store.check([KEY]):
                    first = self._store.get(KEY)
                    time.sleep(GRACE)  # for a rank that notices by itself
                    self._follow(first)
        except (RuntimeError, OSError):  # the store has gone with rank 0, of which connections and launchers tell
            return

    def _fail(self, error: BaseException) -> None:
        """End this process for an error of its own, or because another had one before."""
        code = 2 if isinstance(error, USERS) else 130 if isinstance(error, KeyboardInterrupt) else 1  # of all ranks
        own = f"{code} {self._launch.rank} {type(error).__name__}: {' '.join(str(error).split())}"
        try:
            first = self._store.compare_set(KEY, "", own)
        except (RuntimeError, OSError):
            first = own.encode()
        if first != own.encode():
            self._follow(first)
        self._leaving.acquire()
        self._end(report(error))

    def _follow(self, first: bytes) -> None:
        """End this process because another rank has failed, which has said why."""
        self._leaving.acquire()  # of two threads that come here, the first
        code, rank, reason = first.decode(errors="replace").split(" ", 2)
        who = f"rank {self._launch.rank}"
        print(f"{who}: ended, because rank {rank} failed: {reason[:500]}", file=sys.stderr, flush=True)
        self._end(int(code))

    def _end(self, code: int) -> None:
        """End this process; nothing of a process group is waited for, and a GPU's kernels end with it."""
        with suppress(RuntimeError, OSError):
            heard, deadline = self._store.add(HEARD, 1), time.monotonic() + SECONDS_TO_BE_HEARD
            while self._hosts and heard < self._launch.world_size and time.monotonic() < deadline:
                time.sleep(0.05)
                heard = self._store.add(HEARD, 0)
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):  # whoever read it has gone, or it is closed
                stream.flush()
        os._exit(code)
