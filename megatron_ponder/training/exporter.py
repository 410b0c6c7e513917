"""Exports of a run's checkpoints beside training: one at a time, each in a process of its own, whole or not there."""

import multiprocessing
import os
import shutil
import signal
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from queue import Empty, SimpleQueue

from megatron_ponder.base.errors import USERS, describe
from megatron_ponder.base.signals import SIGNALS
from megatron_ponder.checkpoint.folders import export_of, exports_due, partial_folder
from megatron_ponder.hf.exported_tokenizer import export_tokenizer

# Nothing of training's memory, threads and libraries is in the process of an export.
START_METHOD = "spawn"


class Exporter:
    """Exports checkpoints of a run, each into a folder inside it, on the first rank.

    What is due is noted in the checkpoint before it gets its name, and the note becomes the export; so whatever is cut
    off is made when the run goes on. An export reads its checkpoint from the disk, in a process that takes no time of
    training's, and whose failure is a line and nothing else.
    """

    def __init__(self, dtype: str, tokenizer: Path | None, max_length: int) -> None:
        """Prepare.

        Args:
            dtype: of the exported weights.
            tokenizer: file or folder; None for none.
            max_length: tokens of the longest text that the model is meant for.

        Raises:
            UserError: the tokenizer cannot be exported.
        """
        if tokenizer is not None:
            with tempfile.TemporaryDirectory() as folder:
                export_tokenizer(tokenizer, Path(folder), max_length)
        self._dtype = dtype
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="export")
        self._under_way: list[Future] = []
        self._lock = threading.Lock()
        self._process: multiprocessing.process.BaseProcess | None = None
        self._cut_off = False
        self._news: SimpleQueue[str] = SimpleQueue()

    def begin(self, checkpoint: Path) -> None:
        """Export a checkpoint of which it is noted that this is due, after those before."""
        self._under_way.append(self._thread.submit(self._export, checkpoint))

    def begin_all_due(self, folder: Path) -> None:
        """Export what an earlier start has noted in a folder of checkpoints and not ended."""
        for checkpoint in exports_due(folder):
            self.begin(checkpoint)

    def finish(self) -> None:
        """Wait for all that has begun."""
        for future in self._under_way:
            future.result()
        self._under_way = []

    def cut_off(self) -> None:
        """End what is under way; it stays due."""
        with self._lock:
            self._cut_off = True
            if self._process is not None:
                self._process.kill()
        self.finish()

    def news(self) -> Iterator[str]:
        """What has come of exports since the last call, a line for each."""
        with suppress(Empty):
            while True:
                yield self._news.get_nowait()

    def _export(self, checkpoint: Path) -> None:
        """Let a process export a checkpoint, in the thread, and note what has come of it."""
        output = export_of(checkpoint)
        try:
            problem = self._run_process(checkpoint, output)
        except OSError as error:  # no process can be started
            problem = describe(error)
        if output.exists():
            self._news.put(f"exported {output}")
        elif problem is None:
            self._news.put(f"the export {output} is not finished; it is made when the run goes on")
        else:
            self._news.put(f"warning: {checkpoint} is saved but not exported, training goes on: {problem}")
            shutil.rmtree(partial_folder(output), ignore_errors=True)  # no longer due

    def _run_process(self, checkpoint: Path, output: Path) -> str | None:
        """The problem for which there is no export; None if there is one, or it was cut off."""
        context = multiprocessing.get_context(START_METHOD)
        answer, sender = context.Pipe(duplex=False)
        process = context.Process(target=_export_beside, args=(checkpoint, output, self._dtype, sender), daemon=True)
        with self._lock:
            if self._cut_off:
                return None
            process.start()
            self._process = process
        sender.close()
        process.join()  # and not until `answer` ends: a process that is forked meanwhile, to read data, holds that open
        problem = None
        with suppress(EOFError):
            problem = answer.recv() if answer.poll() else None
        with self._lock:
            self._process = None
        if self._cut_off or -process.exitcode in SIGNALS:  # of which the launcher tells every process
            return None
        return problem or f"its process has ended with code {process.exitcode}"


def _export_beside(checkpoint: Path, output: Path, dtype: str, answer: Connection) -> None:
    """Export in this process, which only training may end, and which ends with it."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_training, daemon=True).start()
    from megatron_ponder.hf.export import export_checkpoint  # with all of transformers, which training does without

    try:
        export_checkpoint(checkpoint, output, dtype)
    except USERS as error:
        answer.send(describe(error))


def _end_with_training() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)
