"""Folders of checkpoints: what they are called, which are complete, which one counts, and which go.

A folder is complete if and only if it has a manifest. Read without PyTorch.
"""

import logging
import secrets
import shutil
from pathlib import Path

from megatron_ponder.base.counts import counted
from megatron_ponder.base.errors import UserError
from megatron_ponder.base.files import did_you_mean, write_atomically

# In a checkpoint's folder; and, beside them, the file that names the latest.
MANIFEST, CONFIG, TOKENIZER, EXPORT = "manifest.json", "config.yaml", "tokenizer", "hf"
LATEST = "latest"
logger = logging.getLogger(__name__)


def checkpoint_name(step: int) -> str:
    """Folder name of the checkpoint after `step` steps."""
    return f"step-{step:08d}"


def checkpoints_in(folder: Path) -> list[Path]:
    """Complete checkpoints in a folder of checkpoints, oldest first."""
    return sorted(path.parent for path in folder.glob(f"step-*/{MANIFEST}"))


def latest_checkpoint(folder: Path) -> Path | None:
    """The checkpoint that `latest` names in a folder of checkpoints, else the newest complete one, else None."""
    complete, named = checkpoints_in(folder), _latest_name(folder)
    return next((path for path in complete if path.name == named), complete[-1] if complete else None)


def latest_problem(folder: Path) -> str | None:
    """Describe what is wrong with `latest`, so that the newest checkpoint of a folder counts; None if nothing is."""
    named = _latest_name(folder)
    if named is None or any(path.name == named for path in checkpoints_in(folder)):
        return None
    return f"{folder / LATEST} names no complete checkpoint beside it"


def _latest_name(folder: Path) -> str | None:
    """The content of `latest`, whatever it may be; None if there is no such thing."""
    pointer = folder / LATEST
    if pointer.is_file():
        return pointer.read_text(encoding="utf-8", errors="replace").strip()
    return "" if pointer.exists() else None


def resolve_checkpoint(path: Path, or_else: str = "") -> Path:
    """The checkpoint folder that a user means by a run folder, a folder of checkpoints or a checkpoint.

    Args:
        path: that they have given.
        or_else: what else they may give, for the message, with a comma before it.

    Raises:
        UserError: if there is no complete checkpoint.
    """
    path = Path(path)
    found = find_checkpoint(path)
    if found is None and is_hugging_face(path):
        raise UserError(
            f"{path} is a Hugging Face model and no checkpoint; make one of it with ponder import-hf --model {path} "
            "--output FOLDER, and give that folder"
        )
    if found is None:
        meant = did_you_mean(path, lambda below: find_checkpoint(below) is not None)
        advice = meant or "; give a run folder, or one of the step-… folders in its checkpoints/" + or_else
        raise UserError(f"{path} holds no complete checkpoint{advice}")
    return found


def find_checkpoint(path: Path) -> Path | None:
    """The checkpoint that a path is, or the one that counts of a run folder or a folder of checkpoints; else None."""
    if (path / MANIFEST).is_file():
        return path
    return latest_checkpoint(path / "checkpoints") or latest_checkpoint(path)


def is_hugging_face(path: Path) -> bool:
    """Whether a folder is that of a Hugging Face model, and no checkpoint."""
    return (path / "config.json").is_file() and find_checkpoint(path) is None


def newest_checkpoints(path: Path, count: int) -> list[Path]:
    """The latest checkpoint of a run folder or a folder of checkpoints, and those before it, oldest first.

    Args:
        path: a folder with a complete checkpoint.
        count: of checkpoints.

    Raises:
        UserError: if there are fewer.
    """
    folder = next(below for below in (path / "checkpoints", path) if checkpoints_in(below))
    latest = latest_checkpoint(folder)
    found = [checkpoint for checkpoint in checkpoints_in(folder) if checkpoint.name <= latest.name]
    if len(found) < count:
        raise UserError(
            f"{folder} has {counted(len(found), 'checkpoint')} up to the latest, not {count}; take so many, or let "
            "runs keep more with checkpoint.keep or checkpoint.keep_every"
        )
    return found[-count:]


def point_latest(folder: Path, name: str) -> None:
    """Let `latest` in a folder of checkpoints name one of them; a folder that has that name gets another one."""
    pointer = folder / LATEST
    if pointer.is_dir() and not pointer.is_symlink():
        aside = folder / f"{LATEST}.{secrets.token_hex(4)}"
        pointer.rename(aside)
        logger.warning("%s was a folder; it is %s now", pointer, aside)
    write_atomically(pointer, name + "\n")


def retain(folder: Path, keep: int, keep_every: int = 0) -> None:
    """Remove checkpoints of a folder of checkpoints; one that cannot be removed is named in a warning.

    The latest is not the newest by number in a run that has gone back to an older checkpoint and on from there.

    Args:
        folder: of checkpoints.
        keep: how many stay: the latest, and of the others the newest.
        keep_every: those of steps that are multiples of this stay as well; 0 for none.
    """
    latest = latest_checkpoint(folder)
    others = [path for path in checkpoints_in(folder) if path != latest]
    for path in others[: max(0, len(others) - (keep - 1))]:
        if is_kept_for_ever(path, keep_every):
            continue
        try:
            remove(path)
        except OSError as error:
            logger.warning("%s could not be removed: %s; remove it yourself", path, error.strerror)


def is_kept_for_ever(path: Path, keep_every: int) -> bool:
    """Whether a checkpoint is of a step that is a multiple of `keep_every`, which is 0 for none."""
    number = path.name.partition("-")[2]
    return keep_every > 0 and number.isdecimal() and int(number) > 0 and int(number) % keep_every == 0


def partial_folder(folder: Path, state: str = "") -> Path:
    """Name beside a checkpoint's folder for what is not, or no longer, complete; hidden and never read."""
    return folder.with_name(f".{folder.name}.{state}.partial" if state else f".{folder.name}.partial")


def partial_folders_in(folder: Path) -> list[Path]:
    """Folders that failed or killed saves, and removals that were cut off, have left in a folder of checkpoints."""
    return sorted(folder.glob(".step-*.partial"))


def remove(folder: Path) -> None:
    """Remove a checkpoint: it loses its name at once, so that it is whole or gone, and then its files.

    What a kill leaves of them is removed by the next save.

    Raises:
        OSError: it keeps its name, and is whole.
    """
    aside = partial_folder(folder, "removed")
    shutil.rmtree(aside, ignore_errors=True)
    folder.rename(aside)
    shutil.rmtree(aside, ignore_errors=True)


def export_of(checkpoint: Path) -> Path:
    """The folder inside a checkpoint for its export, which is whole where it exists, and goes with the checkpoint."""
    return checkpoint / EXPORT


def note_export(checkpoint: Path) -> None:
    """Note in a checkpoint that its export is due, by the folder that becomes the export."""
    partial_folder(export_of(checkpoint)).mkdir()


def exports_due(folder: Path) -> list[Path]:
    """Checkpoints of a folder of checkpoints whose export is due, oldest first."""
    return [path for path in checkpoints_in(folder) if partial_folder(export_of(path)).is_dir()]
