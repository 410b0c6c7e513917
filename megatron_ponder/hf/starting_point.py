"""A run that starts from given weights: what its configuration leaves out is what belongs to them.

Read without PyTorch, unless a Hugging Face folder is read.
"""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from megatron_ponder.base.errors import UserError
from megatron_ponder.checkpoint.folders import (
    CONFIG,
    checkpoints_in,
    find_checkpoint,
    is_hugging_face,
    latest_checkpoint,
)
from megatron_ponder.config import Config, TrainingConfig, architecture, load_config, read_config, written_values
from megatron_ponder.config.sections import turns_positions

# What a Hugging Face folder may say: sections, and single keys of others.
_SECTIONS = ("model", "ponder", "inference")
_KEYS = ("ponder_training.jacobi_iterations", "data.sequence_length", "data.reset_at_eod", "tokenizer.path")


def complete(arguments: Sequence[str]) -> list[str]:
    """The command line of a run, with what it leaves out and `checkpoint.initialize_from` says.

    A Hugging Face folder says what its model is, and what belongs to it; a checkpoint, what it was trained with and
    cannot be used without. A run that goes on takes these from its own checkpoint, so that the folder may be gone.

    Args:
        arguments: `--config FILE.yaml` and `--section.key value`.

    Raises:
        UserError: if the folder cannot be read, or what is written contradicts it; every rank raises the same.
    """
    written = written_values(arguments)
    if written.get("checkpoint.initialize_from") is None:
        return list(arguments)
    try:
        says = _what_the_start_says(written)
    except UserError as error:
        error.shared = True
        raise
    said = {key: value for key, value in says.items() if value is not None}
    left_out = {key: f"--{key}={_text(value)}" for key, value in said.items() if written.get(key) is None}
    behind = [option for key, option in left_out.items() if key in written]  # null, which would count
    return [*(option for key, option in left_out.items() if key not in written), *arguments, *behind]


def require_same(ours: Mapping[str, Any], trained: Mapping[str, Any], folder: Path) -> None:
    """Refuse the first setting in which a model differs; shapes alone would not tell all of them.

    Args:
        ours: values by dotted keys; those that are not there may be anything.
        trained: what they have to be, but for positions where `checkpoint.allow_rope_change` is among ours.
        folder: of the model.

    Raises:
        UserError: naming the setting.
    """
    for key, value in trained.items():
        turns = turns_positions(key)
        if ours.get(key, value) == value or (turns and ours.get("checkpoint.allow_rope_change")):
            continue
        other = ", or add --checkpoint.allow_rope_change true to train it for other positions" if turns else ""
        raise UserError(f"{key} is {ours[key]}, but {folder} was trained with {value}; set --{key} {value}{other}")


def fixed_by(says: Config, ours: Mapping[str, Any]) -> dict[str, Any]:
    """What a run from a Hugging Face folder cannot change: the transformer, though a tied one may get its own head.

    Args:
        says: what the folder says, resolved.
        ours: values of the run by dotted keys.
    """
    fixed = {key: value for key, value in architecture(says).items() if key.startswith("model.")}
    if fixed["model.tie_embeddings"] and ours.get("model.tie_embeddings") is False:
        del fixed["model.tie_embeddings"]
    return fixed


def _what_the_start_says(written: Mapping[str, Any]) -> dict[str, Any]:
    """Values by dotted keys; what cannot be found is left to training to refuse."""
    stored = _stored(written)
    if stored is not None:
        sections = {name: getattr(stored, name.partition(".")[0]) for name in (*_SECTIONS, *_KEYS)}
        whole = {f"{name}.{key}": value for name in _SECTIONS for key, value in vars(sections[name]).items()}
        return whole | {key: getattr(sections[key], key.partition(".")[2]) for key in _KEYS}
    folder = Path(written["checkpoint.initialize_from"])
    if is_hugging_face(folder):
        return _pretrained_says(folder, written)
    checkpoint = find_checkpoint(folder)
    return {} if checkpoint is None else architecture(load_config(checkpoint / CONFIG))


def _pretrained_says(folder: Path, written: Mapping[str, Any]) -> dict[str, Any]:
    from megatron_ponder.hf.pretrained import implied, tokenizer_of  # now, because PyTorch takes seconds

    options = implied(folder)
    says = read_config(options)
    given = {key: value for key, value in written.items() if value is not None}
    require_same(given, fixed_by(says, given), folder)
    own = {} if tokenizer_of(folder, says) is None else {"tokenizer.path": folder}
    return {name.removeprefix("--"): value for name, value in zip(options[::2], options[1::2], strict=True)} | own


def _stored(written: Mapping[str, Any]) -> Config | None:
    """The configuration of the run that goes on; None of one that begins."""
    resume = written.get("checkpoint.resume") or "none"
    if resume == "none":
        return None
    if resume == "auto":
        folder = Path(written.get("training.run_dir") or TrainingConfig.run_dir) / "checkpoints"
        found = [latest_checkpoint(folder), *reversed(checkpoints_in(folder))]
    else:
        found = [find_checkpoint(Path(resume))]
    for checkpoint in found:
        if checkpoint is not None:
            with suppress(UserError):  # damaged; training says so
                return load_config(checkpoint / CONFIG)
    return None


def _text(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
