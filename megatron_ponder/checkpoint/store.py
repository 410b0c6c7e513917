"""Checkpoints on disk: a folder of safetensors files with whole, fp32 tensors by parameter name, and a manifest.

A checkpoint knows nothing of the layout that wrote it: tensors are logical, and the manifest says which file holds
which. Nothing in it is executed when it is read. A folder is complete if and only if it has a manifest, which is
written last, in a folder that gets its final name only then.
"""

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_ponder.checkpoint.files import problem_of, seal, sync, write_tensors
from megatron_ponder.checkpoint.finite import require_finite
from megatron_ponder.config import Config, load_config, to_yaml
from megatron_ponder.errors import UserError
from megatron_ponder.files import did_you_mean

MANIFEST, CONFIG, TOKENIZER, LATEST = "manifest.json", "config.yaml", "tokenizer", "latest"
# What a tensor of a parameter is: the weight itself, or one of AdamW's two moments.
WEIGHT, FIRST_MOMENT, SECOND_MOMENT = "weight", "exp_avg", "exp_avg_sq"


@dataclass
class Manifest:
    """What is in a checkpoint.

    Attributes:
        step: optimiser steps done.
        samples: training samples consumed, which is the whole state of the data order.
        data_fingerprint: of the dataset that they came from; None if there was none.
        tokenizer_fingerprint: of the tokenizer; None if the checkpoint has none.
        tensors: file that holds each tensor, by `kind/parameter name`.
        files: size in bytes and sha256 of each other file.
        skipped: steps among them that changed nothing, because their loss or gradients were not finite.
        validated: false if the validation that was due after this step has been cut off.
        penalty_factor: what a target for the mean number of steps has made of the scheduled penalty.
        penalty_steps: mean K̂ of the last optimiser step that it was steered by; None if there was none.
        layout: of the ranks that wrote it, for people to read; loading does not look at it.
    """

    step: int = 0
    samples: int = 0
    data_fingerprint: str | None = None
    tokenizer_fingerprint: str | None = None
    tensors: dict[str, str] = field(default_factory=dict)
    files: dict[str, tuple[int, str]] = field(default_factory=dict)
    skipped: list[int] = field(default_factory=list)
    validated: bool = True
    penalty_factor: float = 1.0
    penalty_steps: float | None = None
    layout: dict[str, int | str] = field(default_factory=dict)
    format: int = 1


def checkpoint_name(step: int) -> str:
    """Folder name of the checkpoint after `step` steps."""
    return f"step-{step:08d}"


def checkpoints_in(folder: Path) -> list[Path]:
    """Complete checkpoints in a folder of checkpoints, oldest first."""
    return sorted(path.parent for path in folder.glob(f"step-*/{MANIFEST}"))


def latest_checkpoint(folder: Path) -> Path | None:
    """The checkpoint that `latest` names in a folder of checkpoints, else the newest complete one, else None."""
    pointer = folder / LATEST
    if pointer.is_file():
        named = folder / pointer.read_text(encoding="utf-8").strip()
        if (named / MANIFEST).is_file():
            return named
    complete = checkpoints_in(folder)
    return complete[-1] if complete else None


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


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a checkpoint folder.

    Raises:
        UserError: if it is missing or damaged.
    """
    try:
        fields = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        manifest = Manifest(**{**fields, "files": {name: tuple(entry) for name, entry in fields["files"].items()}})
    except FileNotFoundError as error:
        raise UserError(f"{folder} has no {MANIFEST}, so it is no complete checkpoint; use another one") from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{folder / MANIFEST} is damaged; resume from another checkpoint in {folder.parent}") from error
    if manifest.format != 1:
        raise UserError(f"{folder} has checkpoint format {manifest.format}, this version reads 1; update the package")
    return manifest


def verify(folder: Path, manifest: Manifest) -> None:
    """Compare every file's size and checksum with the manifest.

    Raises:
        UserError: naming the first file that is missing or damaged.
    """
    for name, entry in manifest.files.items():
        problem = problem_of(folder / name, *entry)
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
    (folder / CONFIG).write_text(to_yaml(config), encoding="utf-8")
    described = [folder / CONFIG]
    if tokenizer is not None:
        copy_tokenizer(tokenizer, folder / TOKENIZER)
        described += sorted((folder / TOKENIZER).iterdir())
        sync(folder / TOKENIZER)
    files = manifest.files | {path.relative_to(folder).as_posix(): seal(path) for path in described}
    (folder / MANIFEST).write_text(json.dumps(asdict(replace(manifest, files=files)), indent=1), encoding="utf-8")
    sync(folder / MANIFEST)


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
    """Let `latest` in a folder of checkpoints name one of them."""
    aside = folder / f".{LATEST}.partial"
    aside.write_text(name + "\n", encoding="utf-8")
    sync(aside)
    aside.rename(folder / LATEST)
    sync(folder)


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
