"""Inspection of a checkpoint, tensor by tensor: what is inside, and whether it is sound."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open

from megatron_ponder.base.counts import first_of
from megatron_ponder.base.errors import UserError
from megatron_ponder.checkpoint.completeness import expected_tensors, holds_weights_alone
from megatron_ponder.checkpoint.finite import not_finite
from megatron_ponder.checkpoint.folders import CONFIG, checkpoints_in, latest_checkpoint, partial_folders_in
from megatron_ponder.checkpoint.manifest import Manifest, read_manifest
from megatron_ponder.checkpoint.optimizer_state import ADAMW, MUON, WEIGHT
from megatron_ponder.checkpoint.reader import damaged, read_config_of
from megatron_ponder.checkpoint.tensor_files import problem_of, tensors_problem
from megatron_ponder.config import Config


@dataclass(frozen=True)
class FolderEntry:
    """One folder in a folder of checkpoints.

    Attributes:
        path: the folder.
        size: of its files in bytes.
        manifest: None if the checkpoint is not complete, or its manifest is damaged.
        latest: it is the one that a run goes on from.
    """

    path: Path
    size: int
    manifest: Manifest | None
    latest: bool


@dataclass(frozen=True)
class FileReport:
    """One file of a checkpoint.

    Attributes:
        name: relative to the checkpoint.
        size: in bytes, when it was written.
        problem: what is wrong with it; None if nothing was found.
    """

    name: str
    size: int
    problem: str | None


@dataclass(frozen=True)
class TensorReport:
    """One tensor of a checkpoint.

    Attributes:
        kind: the weight, or what the optimiser remembers.
        name: of the parameter.
        file: that holds it.
        dtype: as safetensors calls it.
        shape: of the whole tensor.
        nan, infinite: how many of its values are; 0 where values were not read.
    """

    kind: str
    name: str
    file: str
    dtype: str
    shape: tuple[int, ...]
    nan: int
    infinite: int


@dataclass(frozen=True)
class Inspection:
    """The findings in a checkpoint.

    Attributes:
        folder: of the checkpoint.
        manifest: of the checkpoint.
        config: that it was trained with; None if that file is damaged.
        files: all but the manifest.
        tensors: those in files with which nothing is wrong, in the model's order.
        missing: `kind/parameter name` of tensors that a checkpoint of this model should have; moments only if it has
            any, or has done a step.
    """

    folder: Path
    manifest: Manifest
    config: Config | None
    files: list[FileReport]
    tensors: list[TensorReport]
    missing: list[str]

    @property
    def parameters(self) -> int:
        """Number of parameters."""
        return sum(torch.Size(tensor.shape).numel() for tensor in self.tensors if tensor.kind == WEIGHT)

    def require_sound(self) -> None:
        """Refuse a checkpoint that is not whole, or that holds values that are not finite.

        Raises:
            UserError: naming the first thing that is wrong.
        """
        for file in self.files:
            if file.problem is not None:
                raise damaged(self.folder, file.name, file.problem)
        if self.missing:
            raise UserError(f"{self.folder} lacks {first_of(self.missing, 'tensor')}; use another checkpoint")
        for tensor in self.tensors:
            if tensor.nan or tensor.infinite:
                raise UserError(
                    f"{self.folder}: the {tensor.kind} of {tensor.name} holds {tensor.nan} NaN and {tensor.infinite} "
                    "infinite values; go on from an older checkpoint"
                )


def folder_entries(folder: Path) -> list[FolderEntry]:
    """Every checkpoint in a folder of checkpoints, oldest first, and then what killed saves have left."""
    latest, complete = latest_checkpoint(folder), checkpoints_in(folder)
    incomplete = [path for path in sorted(folder.glob("step-*")) if path.is_dir() and path not in complete]
    entries = []
    for path in (*complete, *incomplete, *partial_folders_in(folder)):
        try:
            manifest = read_manifest(path) if path in complete else None
        except UserError:
            manifest = None
        size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
        entries.append(FolderEntry(path, size, manifest, path == latest))
    return entries


def inspect(folder: Path, contents: bool = True, advance: Callable[[int], None] | None = None) -> Inspection:
    """Look into a checkpoint; of the tensors only one is in memory at a time.

    Args:
        folder: of the checkpoint.
        contents: compare checksums and look at every value; without it, only sizes, names and shapes.
        advance: told the number of further bytes that have been compared.

    Raises:
        UserError: if there is no manifest, or it is damaged.
    """
    manifest = read_manifest(folder)
    held, files, tensors = manifest.tensors_by_file(), [], []
    for name, (size, digest) in manifest.files.items():
        problem = problem_of(folder / name, size, digest if contents else None, advance)
        keys = held.get(name)
        if problem is None and keys is not None:
            problem = tensors_problem(folder / name, keys)
        if problem is None and keys is not None:
            tensors += _tensors(folder, name, keys, contents)
        files.append(FileReport(name, size, problem))
    readable = all(file.problem is None for file in files if file.name == CONFIG)
    config = read_config_of(folder) if readable else None
    wanted = {key: place for place, key in enumerate(_wanted(manifest, config))}
    tensors.sort(key=lambda tensor: wanted.get(f"{tensor.kind}/{tensor.name}", len(wanted)))
    missing = [key for key in wanted if key not in manifest.tensors]
    return Inspection(folder, manifest, config, files, tensors, missing)


def _tensors(folder: Path, name: str, keys: list[str], contents: bool) -> Iterator[TensorReport]:
    with safe_open(folder / name, framework="pt") as file:
        for key in keys:
            kind, _, parameter = key.partition("/")
            view = file.get_slice(key)
            nan, infinite = not_finite(file.get_tensor(key)) if contents else (0, 0)
            yield TensorReport(kind, parameter, name, view.get_dtype(), tuple(view.get_shape()), nan, infinite)


def _wanted(manifest: Manifest, config: Config | None) -> list[str]:
    """Tensors that should be there, in the model's order; without a configuration, those that belong to its weights."""
    if config is not None:
        return list(expected_tensors(manifest, config))
    weights = [key.partition("/")[2] for key in manifest.tensors if key.startswith(f"{WEIGHT}/")]
    return [f"{kind}/{name}" for name in weights for kind in (WEIGHT, *_moments_shown(manifest, name))]


def _moments_shown(manifest: Manifest, name: str) -> tuple[str, ...]:
    """What an optimiser remembers of a parameter, as far as the other tensors of a checkpoint tell."""
    if holds_weights_alone(manifest):
        return ()
    return tuple(MUON if any(f"{kind}/{name}" in manifest.tensors for kind in MUON) else ADAMW)
