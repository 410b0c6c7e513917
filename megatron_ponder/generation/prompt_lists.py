"""A list of prompts from its beginning to its end, on all copies of a model, with results in their order."""

import hashlib
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Protocol

from megatron_ponder.checkpoint.folders import MANIFEST
from megatron_ponder.generation.generate import complete
from megatron_ponder.generation.generator import Generator
from megatron_ponder.generation.interrupts import noted_signals
from megatron_ponder.generation.loading import CheckedSetup
from megatron_ponder.generation.prompts import Task
from megatron_ponder.generation.request import Generation
from megatron_ponder.generation.results import ResultFile, fingerprint, line
from megatron_ponder.generation.totals import TaskProgress, Totals
from megatron_ponder.parallel.collectives import from_all
from megatron_ponder.parallel.mesh import Mesh


class Printer(Protocol):
    """Takes sequences after each of their tokens and at their end."""

    def __call__(self, index: int, generation: Generation) -> None: ...


@dataclass
class Summary:
    """What a job has come to.

    Attributes:
        totals: of all copies, in this run of the job.
        seconds: that it took.
        finished: sequences that have their results, those of earlier runs included.
    """

    totals: Totals = field(default_factory=Totals)
    seconds: float = 0.0
    finished: int = 0


def begin_file(file: ResultFile, checked: CheckedSetup, tasks: Sequence[Task]) -> set[int]:
    """Make ready for the results of tasks, or go on with those that there are; on one rank for all.

    Returns:
        Indices of the tasks that are finished.

    Raises:
        UserError: the file exists, or unfinished results are those of another job.
    """
    manifest = (checked.folder / MANIFEST).read_bytes()
    return file.begin(
        {
            "checkpoint": hashlib.sha256(manifest).hexdigest(),
            "list of prompts": fingerprint(tasks),
            "threshold": checked.rule.threshold,
            "router bias": checked.rule.bias,
            **({} if checked.rule.exit is None else {"confidence exit": str(checked.rule.exit)}),
            "prefill": repr(checked.setup.batching.prefill),
            "precision": checked.precision,
        }
    )


def print_results(generator: Generator, mesh: Mesh, tasks: Sequence[Task], printer: Printer) -> Summary:
    """Run tasks and print what they give, on the first rank: as it comes from one copy, at the end from several.

    All ranks call this together.

    Args:
        generator: of this rank.
        mesh: the ranks.
        tasks: all of them, on every rank.
        printer: takes sequences; only its calls with ended ones matter to a job on several copies.
    """
    alone, results = mesh.data.size == 1, {}
    begun = time.perf_counter()
    totals = Totals()
    with noted_signals() as stop, generator:
        if generator.drives:
            requests = ((index, tasks[index].request) for index in range(mesh.data.rank, len(tasks), mesh.data.size))
            for index, generation in complete(generator, requests, printer if alone else None, stop.is_set):
                if generation.finish_reason != "cancelled":
                    totals.add(generation)
                if not alone:
                    results[index] = generation
            totals.observe(generator)
    parts = from_all((totals, results))
    if generator.drives and mesh.data.rank == 0:
        for index, generation in sorted({index: each for _, part in parts for index, each in part.items()}.items()):
            printer(index, generation)
    return _summary([each for each, _ in parts], begun, 0)


def write_results(
    generator: Generator, mesh: Mesh, tasks: Sequence[Task], file: ResultFile, done: set[int], silent: bool
) -> Summary:
    """Run the tasks that are not done, and write the file when all of them are.

    All ranks call this together.

    Args:
        generator: of this rank.
        mesh: the ranks.
        tasks: all of them, on every rank.
        file: that has been begun.
        done: indices of the tasks that are finished already.
        silent: show no progress on this rank.
    """
    begun = time.perf_counter()
    totals = Totals()
    missing = [index for index in range(len(tasks)) if index not in done][mesh.data.rank :: mesh.data.size]
    with noted_signals() as stop, generator, ExitStack() as stack:
        if generator.drives:
            of_copy = len(missing) + (len(done) if mesh.data.size == 1 else 0)
            progress = stack.enter_context(TaskProgress(of_copy, of_copy - len(missing), silent))
            writer = stack.enter_context(file.appending(mesh.data.rank))
            requests = ((index, tasks[index].request) for index in missing)
            for index, generation in complete(generator, requests, stopped=stop.is_set):
                if generation.finish_reason != "cancelled":
                    writer.add(index, line(tasks[index], generation))
                    totals.add(generation)
                    progress.update(totals)
            totals.observe(generator)
    summary = _summary(from_all(totals), begun, len(done))
    if summary.finished == len(tasks) and generator.drives and mesh.data.rank == 0:
        file.publish(len(tasks))
    return summary


def _summary(parts: Sequence[Totals], begun: float, before: int) -> Summary:
    totals = sum(parts, Totals())
    return Summary(totals, time.perf_counter() - begun, before + totals.sequences)
