"""The status of a run, read from its folder alone: nothing is asked of its processes, and PyTorch is not imported."""

import mmap
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

from megatron_ponder.base.errors import UserError
from megatron_ponder.base.files import did_you_mean
from megatron_ponder.base.yaml_files import read_mapping
from megatron_ponder.checkpoint.folders import MANIFEST, checkpoints_in, export_of, latest_checkpoint
from megatron_ponder.checkpoint.manifest import read_manifest
from megatron_ponder.runs.metrics import METRICS, TASKS, metrics_in, names_of
from megatron_ponder.runs.starts import read_end, read_starts

RECENT = 50  # records that pace and rate are taken from
LOSS, EXACT = "validation_loss", "validation_exact_loss"
PATIENCE = 120.0  # seconds without a record that no pace makes suspicious


@dataclass(frozen=True)
class SavedState:
    """The newest checkpoint that a run would go on from.

    Attributes:
        name: of its folder.
        step: optimiser steps done.
        age: seconds since it was written.
        complete: every file that its manifest names is there with the size that was written.
        exported: its export is there too.
        kept: complete checkpoints that there are, this one among them.
    """

    name: str
    step: int
    age: float
    complete: bool
    exported: bool = False
    kept: int = 1


@dataclass(frozen=True)
class RunStatus:
    """The status of a run.

    Attributes:
        run_dir: the folder.
        state: `finished`, `running`, `stopped` (it has noted why it ended before), `silent` (nothing written for much
            longer than its steps take) or `not started`.
        step: optimiser steps done.
        steps: that it is to do.
        loss: of the last step.
        validation_loss: of the last validation.
        validation_step: its step.
        validation_losses: of that validation, by the names of its sets; empty without names.
        exact_loss: of the validation by `exact` at its end; None before.
        exact_gap: that less the loss of the same samples with the R of training.
        task_scores: of the last evaluation of public tasks, by `NAME/METRIC`; empty without one.
        task_step: its step.
        mean_latent_steps: latent steps per token of the last step.
        latent_scale: the factor on latents that has been learned, of a run that learns it.
        training_flops: model FLOPs of all steps so far, where they are known.
        tokens_per_second: mean over the last records, validation and saving included.
        mfu: of the last step, where it is known.
        seconds_left: at that pace; None unless it is running.
        age: seconds since the last record.
        checkpoint: the newest; None if there is none.
        saving: a folder that a save has not finished, or has left behind.
        starts: how often it has been started; None if it has not been counted.
        last_start: what is known of the last start: time, step, host, ranks, and how the start before it ended.
        end: how the last start ended, if it has noted it.
        slowest_rank, slowest_over_median: of the last comparison of ranks in the last records.
    """

    run_dir: str
    state: str
    step: int
    steps: int
    loss: float | None = None
    validation_loss: float | None = None
    validation_step: int | None = None
    validation_losses: dict[str, float | None] = field(default_factory=dict)
    exact_loss: float | None = None
    exact_gap: float | None = None
    task_scores: dict[str, float | None] = field(default_factory=dict)
    task_step: int | None = None
    mean_latent_steps: float | None = None
    latent_scale: float | None = None
    training_flops: float | None = None
    tokens_per_second: float | None = None
    mfu: float | None = None
    seconds_left: float | None = None
    age: float | None = None
    checkpoint: SavedState | None = None
    saving: str | None = None
    starts: int | None = None
    last_start: dict | None = None
    end: str | None = None
    slowest_rank: int | None = None
    slowest_over_median: float | None = None

    @property
    def restarts(self) -> int | None:
        """Starts after the first."""
        return None if self.starts is None else max(0, self.starts - 1)

    def as_dict(self) -> dict:
        """Everything, as JSON knows it."""
        return asdict(self) | {"restarts": self.restarts}


def run_status(run_dir: Path, now: float | None = None) -> RunStatus:
    """Read a run folder.

    Args:
        run_dir: the folder.
        now: seconds since 1970, to which ages refer; the time of the call unless given.

    Raises:
        UserError: if it is not a run folder.
    """
    now = time.time() if now is None else now
    config = _config(run_dir)
    recent, validation, scored = _records(run_dir / METRICS)
    saved = _of_folder(run_dir, config["training"]["steps"], now)
    if not recent:
        return RunStatus(state="not started" if saved["end"] is None else "stopped", step=0, **saved)
    last, pace = recent[-1], _pace(recent)
    age = max(0.0, now - last.get("time", (run_dir / METRICS).stat().st_mtime))
    state = _state(last["step"] >= saved["steps"], saved["end"], age, pace)
    tokens = _tokens_a_step(recent, config)
    left = last.get("steps_left", saved["steps"] - last["step"])  # older records have none
    compared = next((record for record in reversed(recent) if "slowest_rank" in record), {})
    return RunStatus(
        state=state,
        step=last["step"],
        loss=last.get("loss"),
        validation_loss=validation.get(LOSS),
        validation_step=validation.get("step"),
        validation_losses={name: validation[f"{LOSS}/{name}"] for name in names_of(LOSS, [validation])},
        exact_loss=validation.get(EXACT),
        exact_gap=validation.get("validation_exact_gap"),
        task_scores={name: scored[f"{TASKS}/{name}"] for name in names_of(TASKS, [scored])},
        task_step=scored.get("step"),
        mean_latent_steps=last.get("mean_latent_steps"),
        latent_scale=last.get("latent_scale"),
        training_flops=last.get("training_flops"),
        tokens_per_second=tokens / pace if pace else last.get("tokens_per_second"),
        mfu=last.get("mfu"),
        seconds_left=pace * left if state == "running" and pace else None,
        age=age,
        slowest_rank=compared.get("slowest_rank"),
        slowest_over_median=compared.get("slowest_over_median"),
        **saved,
    )


def _of_folder(run_dir: Path, steps: int, now: float) -> dict:
    """Fields of the status that do not depend on its records."""
    checkpoints, starts, end = run_dir / "checkpoints", read_starts(run_dir), read_end(run_dir)
    return {
        "run_dir": str(run_dir),
        "steps": steps,
        "checkpoint": _newest_checkpoint(checkpoints, now),
        "saving": next((path.name for path in sorted(checkpoints.glob("*.partial"))), None),
        "starts": len(starts) or None,
        "last_start": starts[-1] if starts else None,
        "end": None if end is None else str(end["reason"]),
    }


def _state(done: bool, end: str | None, age: float, pace: float | None) -> str:
    if done:
        return "finished"
    if end is not None:
        return "stopped"
    return "running" if age <= PATIENCE + 10 * (pace or 0.0) else "silent"


def _config(run_dir: Path) -> dict:
    path = run_dir / "config.yaml"
    if not path.is_file():
        meant = did_you_mean(run_dir, lambda below: (below / path.name).is_file())
        advice = meant or "; name a folder that training writes into"
        raise UserError(f"{run_dir} is not a run folder: it has no {path.name}{advice}")
    config = read_mapping(path, "the configuration of a run; copy it anew from a checkpoint")
    try:
        for section, key in (("training", "steps"), ("training", "global_batch_size"), ("data", "sequence_length")):
            int(config[section][key])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is not the configuration of a run; copy it anew from a checkpoint") from error
    return config


def _records(path: Path) -> tuple[list[dict], dict, dict]:
    """The last records, and the last with a validation and with scores of tasks; the file is read from its end."""
    if not path.is_file() or path.stat().st_size == 0:
        return [], {}, {}
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        start = content.rfind(b"\n") + 1  # what follows is still being written, or was cut off
        for _ in range(RECENT):
            start = content.rfind(b"\n", 0, max(0, start - 1)) + 1
        return metrics_in(content[start:]), _last_with(f'"{LOSS}"', content), _last_with(f'"{TASKS}/', content)


def _last_with(text: str, content: mmap.mmap) -> dict:
    """The last record that a text is in; empty if there is none."""
    found = content.rfind(text.encode())
    if found < 0:
        return {}
    line = content[content.rfind(b"\n", 0, found) + 1 : content.find(b"\n", found) + 1]
    return next(iter(metrics_in(line)), {})


def _tokens_a_step(records: list[dict], config: dict) -> float:
    """Mean tokens of a step, whose batches and lengths need not be alike."""
    length = config["data"]["sequence_length"]
    for counted, each in (("tokens", 1), ("samples", length)):  # older records have no tokens
        known = [record for record in records if counted in record]
        if len(known) > 1 and known[0]["step"] < known[-1]["step"]:
            return each * (known[-1][counted] - known[0][counted]) / (known[-1]["step"] - known[0]["step"])
    return config["training"]["global_batch_size"] * length


def _pace(records: list[dict]) -> float | None:
    """Seconds a step, from the times of records of one start; before there are two, from the step alone."""
    last, first = records[-1], records[-1]
    for record in reversed(records[:-1]):
        # a pause much longer than the step itself is the time between two starts
        pause = first.get("time", 0.0) - record.get("time", 0.0) - first.get("step_seconds", 0.0)
        if "time" not in record or pause > PATIENCE + 10 * first.get("step_seconds", 0.0):
            break
        first = record
    if first is last:
        return last.get("step_seconds")
    return (last["time"] - first["time"]) / (last["step"] - first["step"])


def _newest_checkpoint(folder: Path, now: float) -> SavedState | None:
    """The checkpoint that a run would go on from, unless it turns out to be damaged."""
    path = latest_checkpoint(folder)
    if path is None:
        return None
    age, kept = max(0.0, now - (path / MANIFEST).stat().st_mtime), len(checkpoints_in(folder))
    try:
        manifest = read_manifest(path)
    except UserError:
        number = path.name.rpartition("-")[2]
        return SavedState(path.name, int(number) if number.isdecimal() else 0, age, complete=False, kept=kept)
    files = [(path / name, size) for name, (size, _) in manifest.files.items()]
    whole = all(file.is_file() and file.stat().st_size == size for file, size in files)
    return SavedState(path.name, manifest.state.step, age, whole, export_of(path).is_dir(), kept)
