"""Public tasks in the course of a run: `ponder evaluate` on a checkpoint that was just saved, in a process of its own.

Of its own, because lm-evaluation-harness seeds generators, asks launchers' variables how many ranks there are, and may
run out of memory. A checkpoint belongs to no grid, so that any run can be evaluated so. The ranks wait, and agree every
second on whether to stop.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_ponder.base.durations import format_duration
from megatron_ponder.base.environment import without_launcher
from megatron_ponder.base.errors import UserError
from megatron_ponder.base.watchdog import Watchdog
from megatron_ponder.checkpoint.folders import checkpoint_name
from megatron_ponder.config import Config, TasksConfig
from megatron_ponder.parallel.collectives import from_first, together
from megatron_ponder.runs.metrics import TASKS
from megatron_ponder.runs.run_output import Silence
from megatron_ponder.training.boundary import Boundary

# Between two looks at whether the process has ended, or somebody wants the run to.
SECONDS = 1.0
# Of a process that is told to end, until it is killed.
PATIENCE = 10.0


def check_tasks(config: Config, tokenizer: Path | None) -> None:
    """Refuse tasks that could not be evaluated, before the first step: tries all that does not need a trained model.

    The data of the tasks are loaded, or downloaded, on the way.

    Args:
        config: of the run.
        tokenizer: of the run; None for none.

    Raises:
        UserError: the harness is not installed, does not know a task or has no data for it; or the model could not be
            exported for it.
    """
    if not config.tasks.names:
        return
    if tokenizer is None:
        raise UserError(
            "tasks.names needs a tokenizer to read tasks with; set tokenizer.path, or leave tasks.names out"
        )
    if config.ponder.routes_by_token:
        raise UserError(
            "tasks.names cannot be used with ponder.router_input token, a control that cannot be exported for them; "
            "leave tasks.names out"
        )
    from megatron_ponder.hf.exported_tokenizer import export_tokenizer

    with tempfile.TemporaryDirectory() as folder:
        export_tokenizer(tokenizer, Path(folder), config.model.max_position_embeddings)
    with _Process(config.tasks, "--prepare") as process:
        while not process.ended():
            pass
    if process.problem is not None:
        raise UserError(f"tasks.names: {process.problem}")


class TaskEvaluator:
    """Evaluates the tasks of a run every so many steps.

    What a round has found is kept as `tasks/step-….json` in the run's folder. A round that was cut off, or that a crash
    has left no time for, is made up for when the run goes on.

    Attributes:
        pending: whether a round has been cut off.
    """

    def __init__(self, config: Config, boundary: Boundary, watchdog: Watchdog, output: Silence) -> None:
        """Prepare.

        Args:
            config: resolved, with tasks.
            boundary: where the ranks agree.
            watchdog: which does not watch a round.
            output: where it is told and written.
        """
        self._tasks, self._steps = config.tasks, config.training.steps
        self._run_dir = Path(config.training.run_dir)
        self._boundary, self._watchdog, self._output = boundary, watchdog, output
        self.pending = False

    def due(self, step: int) -> bool:
        """Tell whether there is a round after this step: every so often, and at the end."""
        return step > 0 and (step % self._tasks.interval == 0 or step == self._steps)

    def lacks(self, step: int) -> bool:
        """Tell whether there is a checkpoint of this step, and its round has not been; a collective."""
        return from_first(lambda: self._checkpoint(step).is_dir() and not self._results(step).is_file())

    def run(self, step: int) -> None:
        """Evaluate the checkpoint of a step, write its scores and tell them; a collective.

        Whatever goes wrong is told, and training goes on.
        """
        begun = time.monotonic()
        try:
            process = together(lambda: self._begin(step) if dist.get_rank() == 0 else None)
        except UserError as error:
            self._warn(step, error)
            return
        self.pending = True
        with process or nullcontext(), self._watchdog.paused():
            while not from_first(lambda: process.ended()):
                if self._boundary.poll():
                    return
            # What ends the run may have ended the process first.
            if self._boundary.poll() and from_first(lambda: process.problem):
                return
        self.pending = False
        if process is not None:
            self._tell(step, process.problem, time.monotonic() - begun)

    def _begin(self, step: int) -> "_Process":
        self._results(step).parent.mkdir(exist_ok=True)
        self._results(step).unlink(missing_ok=True)
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()  # which the process could not use
        tasks = self._tasks
        options = {"--limit": tasks.limit, "--num-fewshot": tasks.num_fewshot, "--batch-size": tasks.forward_batch_size}
        words = [word for option, value in options.items() if value is not None for word in (option, value)]
        return _Process(tasks, "--checkpoint", self._checkpoint(step), "--output", self._results(step), *words)

    def _tell(self, step: int, problem: str | None, seconds: float) -> None:
        if problem is not None:
            self._warn(step, problem)
            return
        scores = json.loads(self._results(step).read_text(encoding="utf-8"))["tasks"]
        told = ", ".join(f"{score['task']} {score['metric']} {score['value']:.4f}" for score in scores)
        self._output.say(f"step {step}  {told} ({format_duration(seconds)})")
        self._output.complete(step, {_field(score): score["value"] for score in scores})

    def _warn(self, step: int, problem: object) -> None:
        self._output.say(f"step {step}  warning: tasks not evaluated, training goes on: {problem}")

    def _checkpoint(self, step: int) -> Path:
        return self._run_dir / "checkpoints" / checkpoint_name(step)

    def _results(self, step: int) -> Path:
        return self._run_dir / "tasks" / f"{checkpoint_name(step)}.json"


def _field(score: dict) -> str:
    """The name of a score in records, of what every service takes in names."""
    parts = (re.sub(r"[^A-Za-z0-9_.-]+", "_", score[part]).strip("_") for part in ("task", "metric"))
    return "/".join([TASKS, *parts])


class _Process:
    """`ponder evaluate` with the tasks of a run; leave the block of this context manager to end it.

    Attributes:
        problem: what it has ended with, in a line; None if all went well, or it has not ended.
    """

    def __init__(self, tasks: TasksConfig, *words: object) -> None:
        path = [] if tasks.path is None else ["--tasks-path", tasks.path]
        command = [sys.executable, "-m", "megatron_ponder", "evaluate", "--tasks", *tasks.names, *path, *words]
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115, it is the process's
        self._process = subprocess.Popen(
            [*map(str, command)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=self._errors,
            env=without_launcher(os.environ),
        )
        self.problem: str | None = None

    def __enter__(self) -> "_Process":
        return self

    def __exit__(self, *_) -> None:
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        self._errors.close()

    def ended(self) -> bool:
        """Wait a little, and tell whether it has ended."""
        try:
            code = self._process.wait(SECONDS)
        except subprocess.TimeoutExpired:
            return False
        if code != 0:
            self._errors.seek(0)
            lines = [line for line in self._errors.read().decode(errors="replace").splitlines() if line.strip()]
            lines = lines or [f"it ended with exit code {code}"]
            told = next((line for line in lines if line.startswith("error: ")), lines[-1])
            self.problem = told.removeprefix("error: ").strip()
        return True
