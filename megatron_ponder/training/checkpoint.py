"""Saving the state of a run, all ranks together, and finding the state to go on from."""

import shutil
from dataclasses import replace
from pathlib import Path

import torch.distributed as dist
from torch import Tensor

from megatron_ponder.checkpoint.store import (
    Manifest,
    checkpoint_name,
    latest_checkpoint,
    point_latest,
    publish,
    read_manifest,
    resolve_checkpoint,
    retain,
    write_description,
    write_tensors,
)
from megatron_ponder.config import Config
from megatron_ponder.errors import UserError
from megatron_ponder.parallel.collectives import together
from megatron_ponder.training.engine import Engine


class Checkpointer:
    """Writes the checkpoints of one run folder.

    A checkpoint is written aside by all ranks, each a share of the tensors; when all have said that theirs is on the
    disk it gets its name, then `latest` moves, then old ones go. Whatever fails before leaves the last one in place.
    """

    def __init__(self, config: Config, tokenizer: Path | None, fingerprints: tuple[str | None, str | None]) -> None:
        """Prepare to save.

        Args:
            config: resolved; stored with every checkpoint.
            tokenizer: to copy into every checkpoint.
            fingerprints: of the dataset and of the tokenizer.
        """
        self._config, self._tokenizer, self._fingerprints = config, tokenizer, fingerprints
        self.folder = Path(config.training.run_dir) / "checkpoints"

    def save(self, engine: Engine, step: int, samples: int) -> Path:
        """Write the checkpoint after `step` steps; a collective.

        Raises:
            UserError: on every rank, if any rank could not write its part.
        """
        final = self.folder / checkpoint_name(step)
        aside = self.folder / f".{final.name}.partial"
        self._remove_partial()
        try:
            self._write(engine, Manifest(step, samples, *self._fingerprints), aside, final)
        except UserError:
            self._remove_partial()  # the disk may be full
            raise
        return final

    def _remove_partial(self) -> None:
        """Remove what a failed save, or a run that was killed while it saved, has left."""
        if dist.get_rank() == 0:
            for folder in self.folder.glob(".step-*.partial"):
                shutil.rmtree(folder, ignore_errors=True)

    def _write(self, engine: Engine, manifest: Manifest, aside: Path, final: Path) -> None:
        rank, world = dist.get_rank(), dist.get_world_size()
        together(lambda: aside.mkdir(parents=True) if rank == 0 else None)
        own: dict[str, Tensor] = {}
        for index, item in enumerate(engine.state()):
            if index % world == rank:
                own[f"{item.kind}/{item.name}"] = item.tensor
        file = f"tensors-{rank:05d}-of-{world:05d}.safetensors"
        entry = together(lambda: write_tensors(aside, file, own))
        parts: list = [None] * world
        dist.all_gather_object(parts, (file, entry, list(own)))

        def describe() -> None:
            tensors = {key: name for name, _, keys in parts for key in keys}
            files = {name: entry for name, entry, _ in parts}
            write_description(aside, replace(manifest, tensors=tensors, files=files), self._config, self._tokenizer)
            publish(aside, final)
            point_latest(self.folder, final.name)
            retain(self.folder, self._config.checkpoint.keep)

        together(lambda: describe() if rank == 0 else None)


def find_resume(config: Config) -> Path | None:
    """The checkpoint folder to go on from; None to start anew.

    Raises:
        UserError: if the run folder has checkpoints that a new run would overwrite, or there is none to resume.
    """
    resume, run_dir = config.checkpoint.resume, Path(config.training.run_dir)
    existing = latest_checkpoint(run_dir / "checkpoints")
    if resume == "auto":
        return existing
    if resume != "none":
        return resolve_checkpoint(Path(resume))
    if existing is not None:
        raise UserError(
            f"{run_dir} already holds checkpoints, the last one {existing.name}; add --checkpoint.resume auto to go on "
            "from it, or choose another --training.run_dir"
        )
    return None


def check_resumable(folder: Path, config: Config, data_fingerprint: str, tokenizer_fingerprint: str | None) -> Manifest:
    """The manifest of a checkpoint that this run can go on from.

    Raises:
        UserError: if it was made from other data or with another tokenizer, or is ahead of this run.
    """
    manifest = read_manifest(folder)
    if manifest.data_fingerprint not in (None, data_fingerprint) and not config.checkpoint.allow_data_change:
        raise UserError(
            f"the data are not those that {folder} was trained on: the dataset {config.data.path}, data.split, "
            "data.sequence_length or training.seed has changed; put it back, or add "
            "--checkpoint.allow_data_change true to go on all the same"
        )
    known = manifest.tokenizer_fingerprint
    if known is not None and tokenizer_fingerprint is not None and known != tokenizer_fingerprint:
        raise UserError(
            f"the tokenizer {config.tokenizer.path} is not the one that {folder} was trained with; "
            "set tokenizer.path to the tokenizer of that run"
        )
    if manifest.step > config.training.steps:
        raise UserError(
            f"{folder} has done {manifest.step} steps already; set training.steps to more than that to go on"
        )
    return manifest
