"""Writes a checkpoint: aside first, the manifest last, in a folder that gets its final name only then."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from megatron_ponder.base.errors import UserError
from megatron_ponder.base.files import write_atomically
from megatron_ponder.checkpoint.folders import CONFIG, TOKENIZER, partial_folder
from megatron_ponder.checkpoint.manifest import Manifest, write_manifest
from megatron_ponder.checkpoint.optimizer_state import WEIGHT
from megatron_ponder.checkpoint.tensor_files import seal, sync, write_tensors
from megatron_ponder.config import Config, to_yaml


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


def require_free(folder: Path) -> None:
    """Refuse to write a folder that is there already, unless it is empty.

    Raises:
        UserError: it is taken.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} exists already; choose another output folder or remove it")


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
    require_free(folder)
    file = "weights-00000.safetensors"
    with staged(folder) as aside:
        entry = write_tensors(aside, file, {f"{WEIGHT}/{name}": tensor.float() for name, tensor in weights.items()})
        tensors = {f"{WEIGHT}/{name}": file for name in weights}
        write_description(aside, Manifest(tensors=tensors, files={file: entry}), config, tokenizer)
