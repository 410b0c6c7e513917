"""A right that one process at a time has, such as to write to a folder, held by a file that names its owner.

It needs nothing that a network file system might lack: no locks, and no clocks that agree. The file says who the owner
is and holds a number drawn by it; while the owner lives it touches the file. An owner that is gone is noticed at once
on its own machine, and elsewhere by a file that nobody touches. Two that take over from it at the same moment, or an
owner that was taken for dead and was not, are told apart by the number: whoever finds another one there has lost the
right, and asks (`verify`) before each thing that must not happen twice.
"""

import json
import os
import secrets
import socket
import threading
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path

import psutil

from megatron_ponder.base.errors import UserError

SECONDS_BETWEEN_SIGNS = 10.0
SECONDS_BETWEEN_LOOKS = 0.5
# Network file systems may show a change a minute late, and a disk may be busy for that long.
SECONDS_UNTIL_DEAD = 120.0
# The same process is said to have started a little earlier or later when the clock is set.
SECONDS_OF_ONE_START = 2.0


@dataclass(frozen=True)
class Owner:
    """The process that holds a claim.

    Attributes:
        host: name of its machine.
        place: processes that share it can see each other: a start of a machine, and a container on it.
        pid: its number there.
        started: when it did, in seconds since 1970.
        nonce: drawn for this claim, so that no other is like it.
        job: its SLURM job; empty without one.
        restart: how often SLURM had started that job before.
    """

    host: str
    place: str
    pid: int
    started: float
    nonce: str
    job: str = ""
    restart: int = 0

    def __str__(self) -> str:
        since = datetime.fromtimestamp(self.started).strftime("%Y-%m-%d %H:%M:%S")
        return f"process {self.pid} on {self.host}, which started {since}"

    @property
    def is_seen(self) -> bool:
        """Whether this process can see whether that one lives."""
        return (self.host, self.place) == (socket.gethostname(), _place())

    @property
    def is_gone(self) -> bool:
        """Whether the process is known to be no more; SLURM starts a job again when none of its processes is left."""
        job, restart = _job()
        if self.job and self.job == job and self.restart < restart:
            return True
        if not self.is_seen:
            return False
        try:
            process = psutil.Process(self.pid)
            other = abs(process.create_time() - self.started) > SECONDS_OF_ONE_START
            return other or process.status() == psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return True
        except psutil.AccessDenied:
            return False


class Claim:
    """A claim of this process; use as a context manager, or call `take` and `release`.

    Args:
        path: file that stands for the right, in a folder that exists.
        what: the right is to, for messages, such as "the run folder runs/a".
        remedy: what somebody who does not get it can do instead, such as "choose another --output-prefix".
        patience: seconds without a sign of life after which an owner that cannot be seen from here counts as dead.
    """

    def __init__(self, path: str | Path, what: str, remedy: str, patience: float = SECONDS_UNTIL_DEAD) -> None:
        self.path = Path(path)
        self._what, self._remedy, self._patience = what, remedy, patience
        started = psutil.Process().create_time()
        self._own = Owner(socket.gethostname(), _place(), os.getpid(), started, secrets.token_hex(16), *_job())
        self._ended = threading.Event()
        self._signs = threading.Thread(target=self._show_life, name="claim", daemon=True)

    def __enter__(self) -> "Claim":
        self.take()
        return self

    def __exit__(self, *_) -> None:
        self.release()

    def take(self) -> None:
        """Take the claim, once; of an owner that cannot be seen, wait for a sign of life or until it counts as dead.

        Raises:
            UserError: another process has it.
            OSError: the file cannot be written.
        """
        while not self._create():
            if self._is_abandoned():
                self._replace()
                break
        self._signs.start()

    def verify(self) -> None:
        """Raise a `UserError` if the claim is this process's no more."""
        owner = self._read()
        if not self._is_ours(owner):
            now = "is gone" if owner is None else f"names {owner} now"
            raise UserError(
                f"{self._what} is not held by this process any more: {self.path} {now}, because somebody removed it, "
                "or this process gave no sign of life for too long; nothing more is written there"
            )

    def release(self) -> None:
        """Give the claim back, if this process still has it."""
        if self._signs.is_alive():
            self._ended.set()
            self._signs.join()
            with suppress(OSError):  # it counts for nothing when this process is gone
                if self._is_ours(self._read()):
                    self.path.unlink(missing_ok=True)

    def _is_ours(self, owner: Owner | None) -> bool:
        return owner is not None and owner.nonce == self._own.nonce

    def _content(self) -> str:
        return json.dumps(asdict(self._own))

    def _create(self) -> bool:
        """Write the file, unless there is one; whether it was made. If it cannot be written whole, it is not there."""
        try:
            with open(self.path, "x", encoding="utf-8") as file:
                file.write(self._content())
        except FileExistsError:
            return False
        except OSError:
            self.path.unlink(missing_ok=True)
            raise
        return True

    def _replace(self) -> None:
        """Take over from an owner that is gone; of several that do so at once, the last one has the claim."""
        aside = self.path.with_name(f"{self.path.name}.{self._own.nonce}")
        aside.write_text(self._content(), encoding="utf-8")
        os.replace(aside, self.path)
        time.sleep(SECONDS_BETWEEN_LOOKS)
        owner = self._read()
        if not self._is_ours(owner):
            raise self._taken(owner)

    def _is_abandoned(self) -> bool:
        """Whether the owner is gone, or gives no sign of life; false as well if it gives the claim back meanwhile."""
        begun, first = time.monotonic(), self._sign()
        while (sign := self._sign()) is not None:
            owner = self._read()
            if owner is not None and owner.is_gone:
                return True
            if sign != first or (owner is not None and owner.is_seen):
                raise self._taken(owner)
            if self._age(sign) > self._patience or time.monotonic() - begun > self._patience:
                return True
            time.sleep(SECONDS_BETWEEN_LOOKS)
        return False

    def _age(self, sign: int) -> float:
        """Seconds since a sign of life, by the clock of the file system, which sets the times of change."""
        probe = self.path.with_name(f"{self.path.name}.{self._own.nonce}")
        try:
            probe.touch()
            return (probe.stat().st_mtime_ns - sign) / 1e9
        finally:
            probe.unlink(missing_ok=True)

    def _sign(self) -> int | None:
        """When the owner last gave a sign of life, in nanoseconds of the file system's clock; None without a file."""
        try:
            # Opened, because a network file system may answer about a closed file from memory.
            with open(self.path, "rb") as file:
                return os.fstat(file.fileno()).st_mtime_ns
        except FileNotFoundError:
            return None

    def _read(self) -> Owner | None:
        """Who has the claim; None if nobody does or the file does not say."""
        try:
            return Owner(**json.loads(self.path.read_bytes()))
        except (FileNotFoundError, ValueError, TypeError):
            return None

    def _taken(self, owner: Owner | None) -> UserError:
        who = "another process" if owner is None else str(owner)
        return UserError(
            f"{self._what} is in use by {who}: wait until it has ended, or {self._remedy}; if it runs no more, "
            f"remove {self.path}"
        )

    def _show_life(self) -> None:
        while not self._ended.wait(SECONDS_BETWEEN_SIGNS):
            with suppress(OSError):  # the disk may be away for a while
                if self._is_ours(self._read()):
                    os.utime(self.path)


def _place() -> str:
    """A start of the machine and, in a container, the container, which numbers its processes by itself."""
    parts = []
    with suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip())
        parts.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(parts)


def _job() -> tuple[str, int]:
    """The SLURM job that this process belongs to, if any, and how often it has been started before."""
    number, times = os.environ.get("SLURM_JOB_ID", ""), os.environ.get("SLURM_RESTART_COUNT", "")
    cluster = os.environ.get("SLURM_CLUSTER_NAME", "")
    return f"{cluster}/{number}" if number else "", int(times) if times.isdigit() else 0
