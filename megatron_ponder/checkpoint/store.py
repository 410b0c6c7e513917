"""Checkpoints on disk: a folder of safetensors files with whole, fp32 tensors by parameter name, and a manifest.

A checkpoint knows nothing of the layout that wrote it: tensors are logical, and the manifest says which file holds
which. Nothing in it is executed when it is read. A folder is complete if and only if it has a manifest, which is
written last, in a folder that gets its final name only then.
"""

import logging
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_ponder.base.errors import UserError
from megatron_ponder.base.files import did_you_mean, write_atomically
from megatron_ponder.checkpoint.finite import require_finite
from megatron_ponder.checkpoint.manifest import (
    CONFIG,
    LATEST,
    MANIFEST,
    Manifest,
    checkpoints_in,
    latest_checkpoint,
    read_manifest,
    write_manifest,
)
from megatron_ponder.checkpoint.optimizer_state import WEIGHT
from megatron_ponder.checkpoint.tensor_files import problem_of, seal, sync, tensors_problem, write_tensors
from megatron_ponder.config import Config, load_config, to_yaml

logger = logging.getLogger(__name__)

TOKENIZER = "tokenizer"


def resolve_checkpoint(path: Path) -> Path:
    """The checkpoint folder that a user means by a run folder, a folder of checkpoints or a checkpoint.

    Raises:
        UserError: if there is no complete checkpoint.
    """
    path = Path(path)
    if (path / MANIFEST).is_file():
        return path
    found = _newest_of(path)
    if found is None:
        meant = did_you_mean(path, lambda below: _newest_of(below) is not None)
        advice = meant or "; give a run folder, or one of the step-… folders in its checkpoints/"
        raise UserError(f"{path} holds no complete checkpoint{advice}")
    return found


def _newest_of(folder: Path) -> Path | None:
    """The checkpoint of a run folder or a folder of checkpoints; None if it is neither."""
    return latest_checkpoint(folder / "checkpoints") or latest_checkpoint(folder)


def verify(folder: Path, manifest: Manifest) -> None:
    """Compare every file with the manifest: size, checksum, and the tensors that files of tensors should hold.

    Args:
        folder: of the checkpoint.
        manifest: its manifest; one that names some of the files alone has only these compared.

    Raises:
        UserError: naming the first file that is missing or damaged.
    """
    held = manifest.tensors_by_file()
    for name, entry in manifest.files.items():
        problem = problem_of(folder / name, *entry)
        if problem is None and name in held:
            problem = tensors_problem(folder / name, held[name])
        if problem is not None:
            raise damaged(folder, name, problem)


def damaged(folder: Path, name: str, problem: str) -> UserError:
    """The error for a file of a checkpoint with which something is wrong."""
    return UserError(
        f"{folder / name} {problem}; use another checkpoint, or delete {folder} to go on from the one before"
    )


@contextmanager
def open_tensors(folder: Path, verified: bool = False) -> Iterator["TensorReader"]:
    """Verify a checkpoint and read its tensors one by one, whichever files hold them.

    Args:
        folder: of the checkpoint.
        verified: its files have been verified already, so that they need not be read twice.

    Raises:
        UserError: if a file is missing or damaged.
    """
    manifest = read_manifest(folder)
    if not verified:
        verify(folder, manifest)
    with ExitStack() as stack:
        files = {}
        for name in sorted(set(manifest.tensors.values())):
            try:
                files[name] = stack.enter_context(safe_open(folder / name, framework="pt"))
            except SafetensorError as error:
                raise UserError(f"{folder / name} is no safetensors file ({error}); use another checkpoint") from error
        yield TensorReader(folder, manifest, files)


class TensorReader:
    """Random access to the tensors of one checkpoint.

    Attributes:
        manifest: of the checkpoint.
    """

    def __init__(self, folder: Path, manifest: Manifest, files: dict[str, safe_open]) -> None:
        self.manifest, self._folder, self._files = manifest, folder, files

    def names(self, kind: str) -> list[str]:
        """Parameters that have a tensor of this kind."""
        return [key.partition("/")[2] for key in self.manifest.tensors if key.startswith(f"{kind}/")]

    def get(self, kind: str, name: str) -> Tensor:
        """The whole tensor of this kind for one parameter, fp32.

        Raises:
            UserError: if the checkpoint lacks it, or a value of it is not finite.
        """
        key = f"{kind}/{name}"
        if key not in self.manifest.tensors:
            raise UserError(f"the checkpoint has no {kind} of {name}; it was made for another model configuration")
        tensor = self._files[self.manifest.tensors[key]].get_tensor(key)
        require_finite(tensor, f"{self._folder}: the {kind} of {name}", "use an older checkpoint")
        return tensor

    def of_kind(self, kind: str) -> Mapping[str, Tensor]:
        """All tensors of this kind by parameter name, each read when it is asked for."""
        return _TensorsOfKind(self, kind)


class _TensorsOfKind(Mapping[str, Tensor]):
    """What `TensorReader.of_kind` gives."""

    def __init__(self, reader: TensorReader, kind: str) -> None:
        self._reader, self._kind = reader, kind
        self._names = dict.fromkeys(reader.names(kind))

    def __getitem__(self, name: str) -> Tensor:
        if name not in self:
            raise KeyError(name)
        return self._reader.get(self._kind, name)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def read_weights(folder: Path) -> dict[str, Tensor]:
    """All weights of a checkpoint, whole and in fp32, by parameter name.

    Raises:
        UserError: if a file is missing or damaged, or a value is not finite.
    """
    with open_tensors(folder) as tensors:
        return dict(tensors.of_kind(WEIGHT))


def read_config_of(folder: Path) -> Config:
    """The resolved configuration that the checkpoint was trained with."""
    return load_config(folder / CONFIG)


def tokenizer_path(folder: Path) -> Path | None:
    """The tokenizer's folder inside a checkpoint; None if it has none."""
    path = folder / TOKENIZER
    return path if path.is_dir() else None


@contextmanager
def staged(folder: Path) -> Iterator[Path]:
    """A temporary folder beside `folder` that takes its name when the block succeeds and vanishes when it fails."""
    aside = partial_folder(folder)
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        yield aside
        for path in aside.rglob("*"):
            sync(path)
        publish(aside, folder)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


def publish(aside: Path, folder: Path) -> None:
    """Make a finished temporary folder durable and give it its final name, replacing an older one."""
    sync(aside)
    older = partial_folder(folder, "replaced")
    if folder.exists():  # moved away first, because removing it takes time in which neither would have the name
        folder.rename(older)
    aside.rename(folder)
    sync(folder.parent)
    shutil.rmtree(older, ignore_errors=True)


def write_description(folder: Path, manifest: Manifest, config: Config, tokenizer: Path | None) -> None:
    """Write what describes the tensors: configuration, a copy of the tokenizer, and last the manifest of all files."""
    write_atomically(folder / CONFIG, to_yaml(config))
    described = [folder / CONFIG]
    if tokenizer is not None:
        copy_tokenizer(tokenizer, folder / TOKENIZER)
        described += sorted((folder / TOKENIZER).iterdir())
        sync(folder / TOKENIZER)
    files = manifest.files | {path.relative_to(folder).as_posix(): seal(path) for path in described}
    write_manifest(folder, replace(manifest, files=files))


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy a tokenizer file, or a folder's tokenizer files, into the folder `target`."""
    target.mkdir(parents=True, exist_ok=True)
    if source.is_file():
        shutil.copyfile(source, target / ("tokenizer.model" if source.suffix == ".model" else "tokenizer.json"))
        return
    for name in ("tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def point_latest(folder: Path, name: str) -> None:
    """Let `latest` in a folder of checkpoints name one of them; a folder that has that name gets another one."""
    pointer = folder / LATEST
    if pointer.is_dir() and not pointer.is_symlink():
        aside = folder / f"{LATEST}.{secrets.token_hex(4)}"
        pointer.rename(aside)
        logger.warning("%s was a folder; it is %s now", pointer, aside)
    write_atomically(pointer, name + "\n")


def retain(folder: Path, keep: int) -> None:
    """Remove all but `keep` checkpoints of a folder of checkpoints: the latest, and of the others the newest.

    The latest is not the newest by number in a run that has gone back to an older checkpoint and on from there.
    """
    latest = latest_checkpoint(folder)
    others = [path for path in checkpoints_in(folder) if path != latest]
    for path in others[: max(0, len(others) - (keep - 1))]:
        remove(path)


def partial_folder(folder: Path, state: str = "") -> Path:
    """Name beside a checkpoint's folder for what is not, or no longer, complete; hidden and never read."""
    return folder.with_name(f".{folder.name}.{state}.partial" if state else f".{folder.name}.partial")


def partial_folders_in(folder: Path) -> list[Path]:
    """What failed or killed saves have left in a folder of checkpoints."""
    return sorted(folder.glob(".step-*.partial"))


def remove(folder: Path) -> None:
    """Remove a checkpoint; its manifest goes first, so that half a checkpoint is never taken for a whole one."""
    (folder / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(folder)


def write_weights_checkpoint(folder: Path, weights: dict[str, Tensor], config: Config, tokenizer: Path | None) -> None:
    """Write a checkpoint at step 0 that holds weights alone, as conversion does.

    Args:
        folder: the checkpoint's folder; must not exist or be empty.
        weights: whole tensors by parameter name; written in fp32.
        config: resolved.
        tokenizer: file or folder to copy; None for none.

    Raises:
        UserError: if the folder is taken.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} exists already; choose another output folder or remove it")
    file = "weights-00000.safetensors"
    with staged(folder) as aside:
        entry = write_tensors(aside, file, {f"{WEIGHT}/{name}": tensor.float() for name, tensor in weights.items()})
        tensors = {f"{WEIGHT}/{name}": file for name in weights}
        write_description(aside, Manifest(tensors=tensors, files={file: entry}), config, tokenizer)
