"""The checkpoint that a run goes on from: found, verified by all ranks together, of this run's data and tokenizer."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import torch.distributed as dist

from megatron_ponder.base.counts import counted
from megatron_ponder.base.errors import UserError
from megatron_ponder.checkpoint.completeness import check_state
from megatron_ponder.checkpoint.folders import (
    checkpoints_in,
    is_hugging_face,
    latest_checkpoint,
    latest_problem,
    resolve_checkpoint,
)
from megatron_ponder.checkpoint.manifest import Manifest, read_manifest
from megatron_ponder.checkpoint.reader import read_config_of, verify
from megatron_ponder.checkpoint.run_state import RunState
from megatron_ponder.config import Config
from megatron_ponder.data.mixture import same_past
from megatron_ponder.parallel.collectives import together
from megatron_ponder.training.changes import all_changes, positions_changed
from megatron_ponder.training.shares import shared_out


@dataclass(frozen=True)
class Start:
    """The beginning of a run: a checkpoint, given weights, or nothing.

    Attributes:
        state: of the run.
        resumed: the checkpoint that it goes on from, verified; None for a new run.
        weights: the checkpoint, verified, or the Hugging Face folder whose weights it begins with; None for initial
            ones from the seed.
        doubts: what is to be said before it goes on, such as what is wrong with each checkpoint that is passed over.
        changes: what is otherwise from here on, in lines to be said.
    """

    state: RunState
    resumed: Path | None
    weights: Path | None
    doubts: list[str]
    changes: list[str] = field(default_factory=list)


def make_start(config: Config, found: "Resumption", data_fingerprint: str, tokenizer_fingerprint: str | None) -> Start:
    """Make of a checkpoint, or of none, the beginning of a run, or of a phase of one; a collective.

    Args:
        config: resolved, of the phase.
        found: the checkpoint, of `find_resume`.
        data_fingerprint: of its training data.
        tokenizer_fingerprint: None without a tokenizer.

    Raises:
        UserError: on every rank, if the checkpoint is not one that this run can go on from.
    """
    resumed, doubts = found.folder, [f"{problem}; it is passed over" for problem in found.damage]
    if resumed is None:
        given = config.checkpoint.initialize_from
        weights = None if given is None else together(lambda: _given_weights(Path(given)))
        trained = weights is not None and not is_hugging_face(weights)
        if trained:
            verify_together(weights)
        changes = together(lambda: positions_changed(read_config_of(weights), config)) if trained else []
        return Start(RunState(validated=not validates_at_start(config)), None, weights, doubts, changes)
    stored = together(lambda: read_config_of(resumed))
    manifest = together(lambda: check_resumable(resumed, stored, config, data_fingerprint, tokenizer_fingerprint))
    if manifest.state.tokens is None:
        manifest.state.tokens = manifest.state.samples * stored.data.sequence_length
    doubts += latents_taken_away(resumed, manifest.state.step, stored, config)
    changes = together(lambda: all_changes(resumed, manifest, stored, config, data_fingerprint))
    return Start(manifest.state, resumed, resumed, doubts, changes)


def validates_at_start(config: Config) -> bool:
    """Whether a new run is validated before its first step: unless told, where that tells what weights are worth."""
    wanted = config.training.eval_at_start
    given = config.checkpoint.initialize_from is not None
    return given and config.training.eval_interval > 0 if wanted is None else wanted


def _given_weights(path: Path) -> Path:
    """The Hugging Face folder or the checkpoint that a user means.

    Raises:
        UserError: if it is neither.
    """
    return path if is_hugging_face(path) else resolve_checkpoint(path, ", or the folder of a Hugging Face model")


def latents_taken_away(folder: Path, step: int, stored: Config, config: Config) -> list[str]:
    """Say that latent steps, which a checkpoint was trained with, are to be taken away and to begin once more.

    Args:
        folder: of the checkpoint.
        step: optimiser steps that it has done.
        stored: configuration of the checkpoint.
        config: to go on with.

    Returns:
        One line, or none where it is not so.
    """
    before, now = (each.ponder_training.latent_start for each in (stored, config))
    if not (config.ponder.steps and before < step < now):
        return []
    return [
        f"ponder_training.latent_start is {now}, so that tokens have no latent steps again until then, though {folder} "
        f"was trained with them from step {before} on; set it to {before} to go on with them"
    ]


class Resumption(NamedTuple):
    """Where a run goes on.

    Attributes:
        folder: the checkpoint, verified; None to start anew.
        damage: what is wrong with each that has been passed over.
    """

    folder: Path | None
    damage: list[str]

    @property
    def step(self) -> int:
        """Optimiser steps that it has done."""
        return 0 if self.folder is None else read_manifest(self.folder).state.step


def find_resume(config: Config) -> Resumption:
    """Find the checkpoint to go on from, and verify it; a collective.

    With `auto` it is the latest of the run folder, and where that is damaged the newest that is not. A run folder
    without any goes on from the checkpoint that it is to branch off from.

    Raises:
        UserError: on every rank, if the run folder has checkpoints that a new run would overwrite, there is none to
            resume, or none is whole.
    """
    resume = config.checkpoint.resume
    candidates, pointer = together(lambda: (_candidates(config), _pointer_problem(config)))
    damage: list[str] = []
    for folder in candidates:
        try:
            verify_together(folder, resumable=True)
            return Resumption(folder, [*pointer, *damage])
        except UserError as error:
            if resume != "auto":
                raise
            damage.append(str(error))
    if damage:
        raise UserError(
            f"nothing whole is left of {counted(len(damage), 'checkpoint')} in {candidates[0].parent} ({damage[0]}); "
            "resume from a copy with --checkpoint.resume FOLDER, or choose another --training.run_dir to start anew",
            shared=True,
        )
    branch = config.checkpoint.branch_from
    if branch is None:
        return Resumption(None, [])
    folder = together(lambda: resolve_checkpoint(Path(branch)))
    verify_together(folder, resumable=True)
    return Resumption(folder, [])


def _candidates(config: Config) -> list[Path]:
    """Checkpoint folders that the run may go on from, the best first; none to start anew."""
    resume, run_dir = config.checkpoint.resume, Path(config.training.run_dir)
    if resume not in ("auto", "none"):
        return [resolve_checkpoint(Path(resume))]
    latest = latest_checkpoint(run_dir / "checkpoints")
    if latest is None:
        return []
    if resume == "auto":
        others = [folder for folder in checkpoints_in(run_dir / "checkpoints") if folder != latest]
        return [latest, *reversed(others)]
    raise UserError(
        f"{run_dir} already holds checkpoints, the last one {latest.name}; add --checkpoint.resume auto to go on "
        "from it, or choose another --training.run_dir"
    )


def _pointer_problem(config: Config) -> list[str]:
    """Describe what is wrong with `latest` of the run folder, where it is to say which checkpoint counts."""
    problem = latest_problem(Path(config.training.run_dir) / "checkpoints")
    return [problem] if problem is not None and config.checkpoint.resume == "auto" else []


def check_resumable(
    folder: Path, stored: Config, config: Config, data_fingerprint: str, tokenizer_fingerprint: str | None
) -> Manifest:
    """The manifest of a checkpoint that this run can go on from.

    Args:
        folder: of the checkpoint.
        stored: configuration of the checkpoint.
        config: to go on with.
        data_fingerprint: of the data that follow.
        tokenizer_fingerprint: of the run's tokenizer; None without one.

    Raises:
        UserError: if it was made from other data or with another tokenizer, or is ahead of this run.
    """
    manifest = read_manifest(folder)
    seen = manifest.data_fingerprint
    same = seen is None or same_past(seen, data_fingerprint, manifest.state.samples)
    if not same and not config.checkpoint.allow_data_change:
        alone = isinstance(config.data.path, str) and not config.data.phases
        what = f"the dataset {config.data.path}" if alone else "a dataset, a weight, a phase that has begun"
        raise UserError(
            f"the data are not those that {folder} was trained on: {what}, data.split, "
            "data.sequence_length or training.seed has changed; put it back, or add "
            "--checkpoint.allow_data_change true to go on all the same"
        )
    known = manifest.tokenizer_fingerprint
    if known is not None and tokenizer_fingerprint is not None and known != tokenizer_fingerprint:
        raise UserError(
            f"the tokenizer {config.tokenizer.path} is not the one that {folder} was trained with; "
            "set tokenizer.path to the tokenizer of that run"
        )
    before = stored.optimizer.name
    if before != config.optimizer.name:
        raise UserError(
            f"{folder} was trained with optimizer.name {before}, and {config.optimizer.name} cannot go on with what "
            f"that remembers; set it to {before}, or start a new run from its weights by --checkpoint.initialize_from"
        )
    if manifest.state.step > config.training.steps:
        raise UserError(
            f"{folder} has done {counted(manifest.state.step, 'step')} already; set training.steps to more than that "
            "to go on"
        )
    return manifest


def verify_together(folder: Path, resumable: bool = False) -> None:
    """Verify a checkpoint, each rank a share of its files, so that each is read once in the whole job; a collective.

    Args:
        folder: of the checkpoint.
        resumable: whether it must have the whole state of a run, all of it finite.

    Raises:
        UserError: on every rank, naming what is missing, damaged or not finite.
    """

    def verify_share() -> tuple[Manifest, dict[str, tuple[int, str]]]:
        manifest = read_manifest(folder)
        shares = shared_out(manifest.files.items(), lambda file: file[1][0], dist.get_world_size())
        own = dict(file for rank, file in shares if rank == dist.get_rank())
        verify(folder, replace(manifest, files=own))
        return manifest, own

    manifest, own = together(verify_share)
    if resumable:
        together(lambda: check_state(folder, manifest, own))
