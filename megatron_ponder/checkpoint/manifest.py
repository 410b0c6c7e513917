"""The manifest of a checkpoint, which says what belongs to it and what each of its files was; read without PyTorch.

It has a checksum of itself, so that a changed bit of it is found like one of any file that it names. Checkpoints of
format 1 were written without one and go on being read; what can be told of them, types and ranges, is checked alike.
"""

import json
import re
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path, PurePosixPath

from megatron_ponder.base.errors import UserError
from megatron_ponder.base.files import checksum, write_atomically
from megatron_ponder.checkpoint.folders import CONFIG, MANIFEST, checkpoint_name
from megatron_ponder.checkpoint.optimizer_state import KINDS
from megatron_ponder.checkpoint.run_state import RunState

FORMAT = 2
FORMAT_WITHOUT_CHECKSUM = 1
_LARGEST = 2**63  # no count of a run comes near


@dataclass
class Manifest:
    """The content of a checkpoint and the state of the run that wrote it.

    Attributes:
        state: of the run that wrote it.
        data_fingerprint: of the dataset that they came from; None if there was none.
        tokenizer_fingerprint: of the tokenizer; None if the checkpoint has none.
        tensors: file that holds each tensor, by `kind/parameter name`.
        files: size in bytes and sha256 of each other file, by its path within the folder.
        layout: of the ranks that wrote it, for people to read; loading does not look at it.
        averaged: shares of the checkpoints of which it is the average, by their folders; empty if it is none.
    """

    state: RunState = field(default_factory=RunState)
    data_fingerprint: str | None = None
    tokenizer_fingerprint: str | None = None
    tensors: dict[str, str] = field(default_factory=dict)
    files: dict[str, tuple[int, str]] = field(default_factory=dict)
    layout: dict[str, int | str] = field(default_factory=dict)
    averaged: dict[str, float] = field(default_factory=dict)

    def tensors_by_file(self) -> dict[str, list[str]]:
        """The `kind/parameter name` of the tensors that each file of tensors holds."""
        held: dict[str, list[str]] = {}
        for key, file in self.tensors.items():
            held.setdefault(file, []).append(key)
        return held


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write the manifest of a checkpoint durably, with its own checksum; last, because it makes the folder complete."""
    others = asdict(manifest)
    if not manifest.averaged:
        del others["averaged"]  # versions before this would not know it
    content = {"format": FORMAT, **others.pop("state"), **others}
    write_atomically(folder / MANIFEST, json.dumps(content | {"checksum": checksum(content)}, indent=1))


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a checkpoint folder.

    Raises:
        UserError: if it is missing or damaged, or holds what no manifest can.
    """
    path = folder / MANIFEST
    try:
        return _checked(folder, json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse_constant))
    except UserError:
        raise
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(f"{folder} has no {MANIFEST}, so it is no complete checkpoint; use another one") from error
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise _damaged(path, "it is no JSON") from error
    except ValueError as error:
        raise _damaged(path, str(error)) from error


def _checked(folder: Path, content: object) -> Manifest:
    """A manifest of what was read.

    Raises:
        UserError: it is of a later format.
        ValueError: it cannot be.
    """
    if not isinstance(content, dict):
        raise ValueError("it is no JSON object")
    told = content.pop("format", FORMAT_WITHOUT_CHECKSUM)
    if type(told) is not int or told < FORMAT_WITHOUT_CHECKSUM:
        raise ValueError(f"its format cannot be {_shown(told)}")
    if told > FORMAT:
        raise UserError(f"{folder} has checkpoint format {told}, this version reads up to {FORMAT}; update the package")
    if told == FORMAT and content.pop("checksum", None) != checksum({"format": told, **content}):
        raise ValueError("its checksum differs")
    manifest = _from_fields(content)
    named = told == FORMAT_WITHOUT_CHECKSUM and re.fullmatch(r"step-[0-9]{8,}", folder.name)
    if named and folder.name != checkpoint_name(manifest.state.step):
        raise ValueError(f"its step is {manifest.state.step}")
    return manifest


def _damaged(path: Path, reason: str) -> UserError:
    return UserError(f"{path} is damaged ({reason}); resume from another checkpoint in {path.parent.parent}")


def _refuse_constant(name: str) -> None:
    raise ValueError(f"it holds {name}")


def _from_fields(content: dict) -> Manifest:
    """A manifest of its fields, each of which is looked at.

    Raises:
        ValueError: saying which cannot be.
    """
    needed = ("step", "samples", "tensors", "files")
    for name in (*needed, *content):
        if name not in _VALID:
            raise ValueError(f"{_shown(name)} is no part of a manifest")
        if name not in content:
            raise ValueError(f"it lacks {name}")
        if not _VALID[name](content[name]):
            raise ValueError(f"its {name} cannot be {_shown(content[name])}")
    if content["step"] > 0:
        for counted in ("training_flops", "tokens"):  # by versions after the first
            content.setdefault(counted, None)
    state = RunState(**{of.name: content.pop(of.name) for of in fields(RunState) if of.name in content})
    manifest = Manifest(state, **content)
    manifest.files = {name: tuple(entry) for name, entry in manifest.files.items()}
    for name in (CONFIG, *manifest.tensors.values()):
        if name not in manifest.files:
            raise ValueError(f"{name} is not among its files")
    if any(step > manifest.state.step for step in manifest.state.skipped):
        raise ValueError(f"it has skipped step {manifest.state.skipped[-1]} of {manifest.state.step}")
    return manifest


def _shown(value: object) -> str:
    """A value in a message, on one line and not too long."""
    text = ascii(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < _LARGEST


def _is_text(value: object) -> bool:
    return isinstance(value, str) and value.isprintable()


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and 0 <= value < _LARGEST


def _is_finite(value: object) -> bool:
    return type(value) in (int, float) and 0 <= value <= sys.float_info.max


def _is_inside(name: object) -> bool:
    """Tell whether it is the path of a file that lies in the folder."""
    if not _is_text(name) or name in ("", ".", MANIFEST):
        return False
    path = PurePosixPath(name)
    return path.as_posix() == name and not path.is_absolute() and ".." not in path.parts


def _is_tensor(key: str) -> bool:
    kind, _, name = key.partition("/")
    return kind in KINDS and _is_text(name) and name != ""


def _is_entry(entry: object) -> bool:
    """Tell whether it is the size and the sha256 of a file."""
    if not isinstance(entry, list) or len(entry) != 2:
        return False
    size, digest = entry
    return _is_count(size) and _is_text(digest) and len(digest) == 64


def _is_mapping(of_key: Callable[[str], bool], of_value: Callable[[object], bool]) -> Callable[[object], bool]:
    return lambda value: isinstance(value, dict) and all(of_key(k) and of_value(v) for k, v in value.items())


def _are_steps(value: object) -> bool:
    return isinstance(value, list) and all(map(_is_count, value)) and value == sorted({*value} - {0})


_VALID: dict[str, Callable[[object], bool]] = {
    "step": _is_count,
    "samples": _is_count,
    "data_fingerprint": lambda value: value is None or _is_text(value),
    "tokenizer_fingerprint": lambda value: value is None or _is_text(value),
    "tensors": _is_mapping(_is_tensor, _is_inside),
    "files": _is_mapping(_is_inside, _is_entry),
    "skipped": _are_steps,
    "tokens": lambda value: value is None or _is_count(value),
    "training_flops": lambda value: value is None or _is_finite(value),
    "validated": lambda value: isinstance(value, bool),
    "penalty_factor": _is_number,
    "penalty_steps": lambda value: value is None or _is_number(value),
    "penalty_shares": lambda value: value is None or (isinstance(value, list) and all(map(_is_number, value))),
    "averaged": _is_mapping(_is_text, _is_number),
    "layout": _is_mapping(_is_text, lambda value: _is_count(value) or _is_text(value)),
}
