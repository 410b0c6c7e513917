"""Traces of a few steps, to be looked at in a browser."""

from pathlib import Path

import torch
from torch.profiler import ProfilerActivity

from megatron_ponder.base.errors import UserError
from megatron_ponder.base.files import make_folder, replacing
from megatron_ponder.config.run import TrainingConfig
from megatron_ponder.runs.run_output import Silence

FOLDER = "profile"
MEMORY_EVENTS = 200_000  # a step has some tens of thousands of allocations


class Profiler:
    """Traces the steps of `training.profile_steps` on the ranks of `training.profile_ranks`; else it does nothing.

    Use it as a context manager around training: of steps that a run does not come to the end of, what there is of them
    is written too.
    """

    def __init__(self, training: TrainingConfig, rank: int, ranks: int, device: torch.device, output: Silence) -> None:
        """Prepare.

        Args:
            training: section.
            rank: of this process.
            ranks: of the run.
            device: of this rank.
            output: where this rank tells what happens.

        Raises:
            UserError: on every rank, if one that is to write does not exist.
        """
        chosen = training.profile_ranks or [0]
        if training.profile_steps and max(chosen) >= ranks:
            raise UserError(
                f"training.profile_ranks has rank {max(chosen)}, but there are {ranks}, which count from 0", shared=True
            )
        first, last = training.profile_steps or (1, 0)
        self._steps = range(first, last + 1) if rank in chosen else range(0)
        self._folder, self._rank, self._device, self._output = Path(training.run_dir) / FOLDER, rank, device, output
        self._profile: torch.profiler.profile | None = None
        self._first = self._last = 0

    def __enter__(self) -> "Profiler":
        return self

    def __exit__(self, *_) -> None:
        if self._profile is not None:
            self._write()

    def begin(self, step: int) -> None:
        """Start before the first step that is to be traced, or the first one that is left of them.

        Args:
            step: that begins, from 1.
        """
        if step not in self._steps:
            return
        self._last = step
        if self._profile is None:
            self._first = step
            if self._device.type == "cuda":
                torch.cuda.memory._record_memory_history(max_entries=MEMORY_EVENTS)
            activities = [ProfilerActivity.CPU]
            activities += [ProfilerActivity.CUDA] if self._device.type == "cuda" else []
            self._profile = torch.profiler.profile(activities=activities, record_shapes=True)
            self._profile.start()

    def end(self, step: int) -> None:
        """Write after the last of them.

        Args:
            step: that has ended, with all that came after it.
        """
        if self._profile is not None and step >= self._steps[-1]:
            self._write()

    def _write(self) -> None:
        """Stop, and write; a disk that is full costs the trace and not the run."""
        profile, self._profile = self._profile, None
        profile.stop()
        name = f"rank_{self._rank}_steps_{self._first}_to_{self._last}"
        try:
            make_folder(self._folder)
            with replacing(self._folder / f"{name}.json.gz") as path:
                profile.export_chrome_trace(str(path))
            if self._device.type == "cuda":
                with replacing(self._folder / f"{name}_memory.pickle") as path:
                    torch.cuda.memory._dump_snapshot(str(path))
        except (OSError, UserError) as error:
            self._output.say(f"warning: no trace of steps {self._first} to {self._last}: {error}")
        else:
            self._output.say(f"wrote {self._folder / name}.json.gz, which ui.perfetto.dev opens")
        finally:
            if self._device.type == "cuda":
                torch.cuda.memory._record_memory_history(enabled=None)
