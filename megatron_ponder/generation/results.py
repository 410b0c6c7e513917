"""Results of many sequences on their way into one file, which is either whole or absent.

Until all are there, every copy of the model appends what it has finished to a file of its own in a folder beside the
output, so that a job that was interrupted goes on where it was.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from megatron_ponder.base.errors import UserError
from megatron_ponder.base.files import make_folder, replacing, sync, write_atomically
from megatron_ponder.generation.prompts import Task
from megatron_ponder.generation.request import Generation

JOB = "job.json"


def record(task: Task, generation: Generation) -> dict[str, Any]:
    """What is written of one sequence; docs/inference.md describes the fields."""
    fields: dict[str, Any] = {"index": task.prompt, "sample": task.sample}
    if task.id is not None:
        fields["id"] = task.id
    fields |= {
        "text": generation.text,
        "finish_reason": generation.finish_reason,
        **({"error": generation.error} if generation.error else {}),
        "prompt_tokens": generation.prompt,
        "tokens": generation.tokens,
        "executed_steps": generation.executed_steps,
        "cached_slots": generation.cached_slots,
        "log_probabilities": generation.log_probabilities,
    }
    if task.request.top_log_probabilities:
        fields["top_log_probabilities"] = generation.top_log_probabilities
    timings = ("seconds_waited", "seconds_to_first", "seconds")
    return fields | {name: round(getattr(generation, name), 6) for name in timings}


def line(task: Task, generation: Generation) -> str:
    """The record as a line of JSON, without its line end."""
    return json.dumps(record(task, generation), ensure_ascii=False)


def fingerprint(tasks: Sequence[Task]) -> str:
    """SHA-256 of all that is asked for."""
    digest = hashlib.sha256()
    for task in tasks:
        request = task.request
        stop_ids = sorted(request.stop_ids)
        rest = (request.prompt, request.max_new_tokens, request.sampling, stop_ids, request.stop_strings)
        digest.update(repr((rest, request.top_log_probabilities, task.prompt, task.sample, task.id)).encode())
    return digest.hexdigest()


class ResultFile:
    """A file of JSON lines, one a task in their order, and what there is of it before it is whole."""

    def __init__(self, output: Path) -> None:
        """Touch nothing yet."""
        self.output = output
        self.folder = output.with_name(f"{output.name}.unfinished")

    def begin(self, job: dict[str, Any]) -> set[int]:
        """Make ready for results, or go on with those that there are; on one rank, before any copy appends.

        Args:
            job: what decides the results, by names that mean something to people.

        Returns:
            Indices of the tasks that are finished.

        Raises:
            UserError: the output exists, or unfinished results are those of another job.
        """
        if self.output.exists():
            raise UserError(f"{self.output} exists already; choose another --output, or remove it")
        make_folder(self.folder)
        described = self.folder / JOB
        if described.is_file():
            before = json.loads(described.read_text(encoding="utf-8"))
            different = [name for name in job if before.get(name) != job[name]]
            if different:
                raise UserError(
                    f"{self.folder} has unfinished results with another {different[0]}; repeat the command that made "
                    "them to go on, choose another --output, or remove the folder"
                )
        else:
            write_atomically(described, json.dumps(job, indent=1).encode())
        for path in self._parts():
            _drop_torn_line(path)
        return {index for index, _, _, _ in self._finished()}

    @contextmanager
    def appending(self, copy: int) -> Iterator["ResultWriter"]:
        """Append results of one copy of the model.

        Args:
            copy: its rank among the copies.
        """
        with open(self.folder / f"copy-{copy}.jsonl", "ab") as file:
            yield ResultWriter(file)
            sync(file)

    def publish(self, tasks: int) -> None:
        """Put the results of all tasks into the output, in their order."""
        places = {index: (path, start, length) for index, path, start, length in self._finished()}
        files = {path: open(path, "rb") for path in self._parts()}  # noqa: SIM115
        try:
            with replacing(self.output) as aside, open(aside, "wb") as output:
                for index in range(tasks):
                    path, start, length = places[index]
                    files[path].seek(start)
                    output.write(files[path].read(length))
        finally:
            for file in files.values():
                file.close()
        shutil.rmtree(self.folder)

    def _parts(self) -> list[Path]:
        return sorted(self.folder.glob("copy-*.jsonl"))

    def _finished(self) -> Iterator[tuple[int, Path, int, int]]:
        """Of every finished task: index, file, where its line starts, and how long it is."""
        for path in self._parts():
            at = 0
            with open(path, "rb") as file:
                for content in file:
                    index, _, rest = content.partition(b"\t")
                    yield int(index), path, at + len(content) - len(rest), len(rest)
                    at += len(content)


class ResultWriter:
    """Appends finished results to a file, each at once."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def add(self, index: int, content: str) -> None:
        """Append the line of a task."""
        self._file.write(f"{index}\t{content}\n".encode())
        self._file.flush()


class LinePrinter:
    """Prints the lines of tasks that have ended to standard output, one after another in the order of the tasks."""

    def __init__(self, tasks: Sequence[Task]) -> None:
        """Begin with the first one."""
        self._tasks, self._turn = tasks, 0
        self._early: dict[int, str] = {}

    def __call__(self, index: int, generation: Generation) -> None:
        """Take note of a sequence that has a new token, or has ended."""
        if generation.finish_reason is not None:
            self._early[index] = line(self._tasks[index], generation)
            while self._turn in self._early:
                print(self._early.pop(self._turn), flush=True)
                self._turn += 1


def _drop_torn_line(path: Path) -> None:
    """Cut off the last line if it was not written to its end."""
    with open(path, "rb+") as file:
        size = file.seek(0, os.SEEK_END)
        at = size
        while at > 0:
            start = max(0, at - (1 << 16))
            file.seek(start)
            end = file.read(at - start).rfind(b"\n")
            if end >= 0:
                at = start + end + 1
                break
            at = start
        if at < size:
            file.truncate(at)
