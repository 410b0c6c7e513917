"""The thread that owns a generator: requests join its running batch, and what becomes of them goes back.

Whatever happens to the generator happens in the thread that calls `Worker.serve`; other threads hand over commands.
"""

import math
import queue
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

from megatron_ponder.base.errors import UserError
from megatron_ponder.generation.generator import Generator
from megatron_ponder.generation.request import FinishReason, Generation, Request
from megatron_ponder.generation.sequences import Sequence, Usage

# How often an idle worker looks whether it is to stop, should a signal have gone to another thread, and lets the other
# ranks hear from it.
IDLE_SECONDS = 0.5

State = Literal["loading", "ready", "stopping", "failed", "stopped"]


class UnavailableError(Exception):
    """There is no generator that could take a job."""


class QueueFullError(Exception):
    """Too many sequences wait already."""


class EngineFailedError(Exception):
    """The generator broke down while a job was under way."""


class RequestGroupFailedError(Exception):
    """A job could not be begun, for a reason that the server's log has; the generator goes on."""


@dataclass(frozen=True)
class Progress:
    """What a sequence has gained since the last time.

    Attributes:
        index: of its request in the job.
        tokens, log_probabilities, top_log_probabilities: new ones.
        text: new part.
        finish_reason: set with the last one.
        error: why the sequence has failed, where it has.
        count: tokens so far.
        fed, executed: at the end, tokens that the model was fed, and K̂ of all of them together.
    """

    index: int
    tokens: list[int]
    log_probabilities: list[float]
    top_log_probabilities: list[list[tuple[int, float]]]
    text: str
    finish_reason: FinishReason | None
    error: str
    count: int
    fed: int = 0
    executed: int = 0


Event = Progress | UserError | RequestGroupFailedError | EngineFailedError


@dataclass(eq=False)
class RequestGroup:
    """Requests that are answered together.

    Attributes:
        requests: one a sequence.
        streams: report every token; otherwise each sequence once, at its end.
        post: takes events, in the worker's thread. After an error no other event follows.
    """

    requests: list[Request]
    streams: bool
    post: Callable[[list[Event]], None]
    sequences: list[Sequence] = field(default_factory=list)
    unfinished: int = 0


@dataclass(frozen=True)
class Snapshot:
    """Where the generator was after its newest step.

    Attributes:
        waiting, live: sequences.
        cached_slots: of the live ones.
        usage: counts since the beginning.
        fed, executed: tokens that the sequences which have ended were fed, and K̂ of all of them together.
    """

    waiting: int = 0
    live: int = 0
    cached_slots: int = 0
    usage: Usage = field(default_factory=Usage)
    fed: int = 0
    executed: int = 0


class Worker:
    """Runs jobs on a generator.

    Attributes:
        most_sequences: accepted at a time, whether they run or wait.
        state: of the generator.
        snapshot: of the generator.
    """

    def __init__(self, most_sequences: int, observe: Callable[[Generation], None]) -> None:
        """Wait for a generator.

        Args:
            most_sequences: accepted at a time.
            observe: called in the worker's thread with every sequence that ends.
        """
        self.most_sequences = most_sequences
        self.state: State = "loading"
        self.snapshot = Snapshot()
        self._observe = observe
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._accepted = 0
        self._fed = self._executed = 0
        self._stop_by = math.inf
        self._generator: Generator | None = None
        self._jobs: list[RequestGroup] = []
        self._outbox: dict[RequestGroup, list[Event]] = {}

    def submit(self, job: RequestGroup) -> None:
        """Hand over a job, from any thread.

        Raises:
            UnavailableError: there is no generator, or it takes no more jobs.
            QueueFullError: until others have ended.
        """
        with self._lock:
            if self.state != "ready":
                raise UnavailableError(f"the server is {self.state}")
            if self._accepted + len(job.requests) > self.most_sequences:
                raise QueueFullError(f"{self._accepted} sequences run or wait already; try again later")
            self._accepted += len(job.requests)
            self._commands.put(partial(self._begin, job))

    def cancel(self, job: RequestGroup) -> None:
        """Let go of what a job has left, from any thread; it still hears how its sequences end."""
        self._commands.put(partial(self._cancel, job))

    def stop(self, grace: float) -> None:
        """Take no more jobs, and end when there are none; cancel those left after so many seconds.

        From any thread and from signal handlers, so it takes no lock.
        """
        self._stop_by = min(self._stop_by, time.monotonic() + grace)
        self._commands.put(lambda: None)

    def serve(self, generator: Generator, beat: Callable[[], None] = lambda: None) -> None:
        """Run jobs until stopped.

        Args:
            generator: whose block has been entered.
            beat: called before everything that may take a while.

        Raises:
            Exception: whatever the generator raised; every job has been told.
        """
        self._generator = generator
        self._become("ready")
        try:
            while self.state == "ready" or self._accepted:
                beat()
                self._obey(wait=generator.idle)
                beat()
                if self._stop_by < math.inf and self.state == "ready":
                    self._become("stopping")
                if time.monotonic() >= self._stop_by:
                    for job in list(self._jobs):
                        self._cancel(job)
                if generator.idle:
                    generator.keep_alive()
                else:
                    generator.step()
                self._report()
            while not generator.idle:  # those that were cancelled last leave the cache
                beat()
                generator.step()
            self._report()
            self._become("stopped")
        except BaseException:
            self._become("failed")
            raise
        finally:
            # Jobs that have ended hear how; those handed over in time, but not begun, hear of a failure as well.
            self._obey(wait=False)
            self._post()
            self._fail_jobs()

    def give_up(self) -> None:
        """The generator hangs: take no more jobs, and let all that there are hear of it; from any thread."""
        self._become("failed")
        self._obey(wait=False)
        self._fail_jobs()

    def _fail_jobs(self) -> None:
        for job in list(self._jobs):
            job.post([EngineFailedError("the generator failed; see the server's log")])

    def _become(self, state: State) -> None:
        with self._lock:
            self.state = state

    def _obey(self, wait: bool) -> None:
        """Do what other threads have asked for."""
        try:
            command = self._commands.get(timeout=IDLE_SECONDS) if wait else self._commands.get_nowait()
            while True:
                command()
                command = self._commands.get_nowait()
        except queue.Empty:
            pass

    def _begin(self, job: RequestGroup) -> None:
        self._jobs.append(job)
        job.unfinished = len(job.requests)
        if self.state == "failed":
            return
        try:
            for request in job.requests:
                self._generator.check(request)
        except UserError as error:
            self._drop(job, error)
            return
        except Exception:  # a bug, which shows its traceback; but the other jobs have nothing to do with it
            traceback.print_exc()
            self._drop(job, RequestGroupFailedError("the request could not be begun; see the server's log"))
            return
        for index, request in enumerate(job.requests):
            job.sequences.append(self._generator.submit(request, _Reporter(self, job, index)))

    def _drop(self, job: RequestGroup, error: UserError | RequestGroupFailedError) -> None:
        """Forget a job of which nothing has begun."""
        self._outbox[job] = [error]
        self._jobs.remove(job)
        self._free(len(job.requests))

    def _cancel(self, job: RequestGroup) -> None:
        if self.state != "failed":
            for sequence in job.sequences:
                self._generator.cancel(sequence)

    def note(self, job: RequestGroup, progress: Progress, generation: Generation) -> None:
        """Take the progress of a sequence, in the worker's thread."""
        self._outbox.setdefault(job, []).append(progress)
        if progress.finish_reason is not None:
            self._observe(generation)
            self._fed += progress.fed
            self._executed += progress.executed
            self._free(1)
            job.unfinished -= 1
            if not job.unfinished:
                self._jobs.remove(job)

    def _free(self, sequences: int) -> None:
        with self._lock:
            self._accepted -= sequences

    def _report(self) -> None:
        generator = self._generator
        self.snapshot = Snapshot(
            generator.waiting, len(generator.live), generator.cached_slots, generator.usage, self._fed, self._executed
        )
        self._post()

    def _post(self) -> None:
        while self._outbox:
            job, events = self._outbox.popitem()
            job.post(events)


class _Reporter:
    """Tells a job what one of its sequences has gained."""

    def __init__(self, worker: Worker, job: RequestGroup, index: int) -> None:
        self._worker, self._job, self._index = worker, job, index
        self._tokens, self._text = 0, 0

    def __call__(self, generation: Generation) -> None:
        if generation.finish_reason is None and not self._job.streams:
            return
        since, executed = self._tokens, generation.executed_steps if generation.finish_reason is not None else []
        progress = Progress(
            index=self._index,
            tokens=generation.tokens[since:],
            log_probabilities=generation.log_probabilities[since:],
            top_log_probabilities=generation.top_log_probabilities[since:],
            text=generation.text[self._text :],
            finish_reason=generation.finish_reason,
            error=generation.error,
            count=len(generation.tokens),
            fed=len(executed),
            executed=sum(executed),
        )
        self._tokens, self._text = len(generation.tokens), len(generation.text)
        self._worker.note(self._job, progress, generation)
