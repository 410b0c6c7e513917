"""The numbers of a run: `metrics.jsonl`, one JSON object a step, and the services that draw them."""

import json
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron_ponder.base.errors import UserError, describe
from megatron_ponder.base.files import write_atomically
from megatron_ponder.config import LoggingConfig
from megatron_ponder.runs.json_lines import records_in
from megatron_ponder.runs.lasting_file import LastingFile
from megatron_ponder.runs.tensorboard_events import TensorBoardEvents
from megatron_ponder.runs.weights_and_biases import WandbRun

METRICS = "metrics.jsonl"
TASKS = "tasks"  # scores of public tasks are tasks/NAME/METRIC
# Numbers that had other names before, under which older runs have them.
RENAMED = {
    f"{part}{old}": f"{part}{new}"
    for part in ("", "validation_")
    for old, new in (
        ("mean_steps", "mean_latent_steps"),
        ("step_histogram", "latent_step_histogram"),
        ("steps_follow_loss", "latent_steps_follow_loss"),
    )
}
Value = float | int | list | str | bool | None
logger = logging.getLogger(__name__)


def read_metrics(run_dir: Path) -> list[dict]:
    """All records of a run, in order; a last line cut off by a crash is left out. A number not finite is None."""
    return metrics_in((run_dir / METRICS).read_bytes())


def metrics_in(lines: bytes) -> list[dict]:
    """Records of some lines of the file, by the names that their numbers have now."""
    return [{RENAMED.get(name, name): value for name, value in record.items()} for record in records_in(lines)]


def of_steps(records: Sequence[dict]) -> list[dict]:
    """Those of some records that are of optimiser steps; a validation before the first has a record of its own."""
    return [record for record in records if record["step"] > 0]


def names_of(field: str, records: Sequence[dict]) -> list[str]:
    """Names of the validation sets that have a field in some records, as `code` has in `validation_loss/code`."""
    names = (key.partition("/") for record in records for key in record)
    return list(dict.fromkeys(name for number, _, name in names if number == field and name))


class MetricsLog:
    """The record of a run on disk, written by rank 0 alone.

    What cannot be written, because the disk is full, is kept and written later; training goes on.

    Attributes:
        kept: the records of the run before, up to the step that it goes on from.
    """

    def __init__(self, run_dir: Path, config: LoggingConfig, first_step: int, settings: Mapping | None = None) -> None:
        """Open for appending; what an interrupted run wrote after its last checkpoint is dropped.

        Args:
            run_dir: the run's folder.
            config: what to write.
            first_step: steps done; later records are dropped.
            settings: the whole configuration, for Weights & Biases.

        Raises:
            UserError: Weights & Biases is wanted and cannot be logged to.
        """
        path = run_dir / METRICS
        records = read_metrics(run_dir) if path.exists() else []
        self.kept = [record for record in records if 0 < first_step >= record["step"]]
        self._last = self.kept[-1] if self.kept else {}
        write_atomically(path, "".join(_line(record) for record in self.kept))
        self._file = LastingFile(path)
        self._waiting: list[bytes] = []
        self._events = TensorBoardEvents(run_dir, first_step) if config.tensorboard else None
        project = config.wandb_project
        self._wandb = None if project is None else WandbRun(run_dir, project, settings or {})

    def write(self, record: Mapping[str, Value]) -> None:
        """Append one record; `step` says which step it belongs to."""
        self._last = record
        self._waiting.append(_line(record).encode())
        self._flush()
        self._publish(record)

    def complete(self, step: int, fields: Mapping[str, Value]) -> None:
        """Add fields to the record of a step, the last one before this start."""
        if self._last.get("step") == step:
            self._file.shorten(len(_line(self._last).encode()))
        self._last = {"step": step} | self._last | fields
        self._waiting.append(_line(self._last).encode())
        self._flush()
        self._publish({"step": step} | fields)

    def close(self) -> None:
        """Write what is left and close everything."""
        self._flush()
        self._file.close()
        for service in self._services():
            service.finish()

    def _flush(self) -> None:
        try:
            removed = self._file.append(b"".join(self._waiting))
        except (OSError, UserError) as error:
            if len(self._waiting) == 1:
                logger.warning("%s cannot be written, and is kept in memory: %s", self._file.path, describe(error))
            return
        self._waiting.clear()
        if removed and self._events is not None:
            self._events.begin_again(self._last["step"] - 1)

    def _publish(self, record: Mapping[str, Value]) -> None:
        numbers = {key: value for key, value in record.items() if isinstance(value, int | float) and key != "step"}
        for service in self._services():
            service.log(numbers, record["step"])

    def _services(self) -> list[TensorBoardEvents | WandbRun]:
        return [service for service in (self._events, self._wandb) if service is not None]


def _line(record: Mapping[str, Value]) -> str:
    """One line of JSON, which has no number for what is not finite."""
    finite = {k: [_finite(x) for x in v] if isinstance(v, list) else _finite(v) for k, v in record.items()}
    return json.dumps(finite, allow_nan=False) + "\n"


def _finite(value: Value) -> Value:
    return None if isinstance(value, float) and not math.isfinite(value) else value
