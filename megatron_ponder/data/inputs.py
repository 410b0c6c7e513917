"""What `--input` names: files, folders, patterns and datasets, and what of it is left out."""

import glob
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, dataclass, field
from pathlib import Path
from typing import Literal

from megatron_ponder.base.errors import UserError
from megatron_ponder.config.declarations import path_field
from megatron_ponder.data.formats import AUTO, TEXT, FormatError, format_of
from megatron_ponder.data.tables import HUB, is_saved_dataset
from megatron_ponder.data.text_files import split_name

DATASET = "dataset"


@dataclass(frozen=True)
class Source:
    """Where a user says that texts are.

    Attributes:
        input: files, folders, glob patterns, folders of save_to_disk, or hf://owner/name[:split].
        key: field of a JSON line or column that holds the text.
        format: what all files are: lines (JSON, one object each), parquet or text; auto is as their endings say.
    """

    input: tuple[str, ...] = path_field(MISSING)
    key: str = "text"
    format: Literal["auto", "lines", "parquet", "text"] = AUTO


@dataclass
class Inputs:
    """What is read.

    Attributes:
        formats: by the names of files and of saved datasets, absolute, and of datasets on the hub, in the order that
            they are read in: what `format_of` says, or `DATASET`.
        left_out: what lies in folders and is not read, by kind.
        beside_tables: texts of folders that have tables as well, by their endings, such as the README of a corpus.
    """

    formats: dict[str, str] = field(default_factory=dict)
    left_out: Counter[str] = field(default_factory=Counter)
    beside_tables: Counter[str] = field(default_factory=Counter)

    def describe_left_out(self) -> str:
        """A line such as "left out of folders: 3 × .csv, 1 × dangling link"; empty if there is nothing."""
        return f"left out of folders: {describe_counts(self.left_out)}" if self.left_out else ""

    def warnings(self) -> list[str]:
        """What somebody may not expect of folders: what is left out of them, and texts that are read beside tables."""
        found = [self.describe_left_out()] if self.left_out else []
        if self.beside_tables:
            texts = describe_counts(self.beside_tables)
            found.append(f"read as texts beside tables: {texts}; name the files to have only the others")
        return found


def find_inputs(inputs: Sequence[str | Path], declared: str = AUTO) -> Inputs:
    """Files, saved datasets and names on the hub, each once, in the order they are read.

    Args:
        inputs: files, folders, glob patterns and `hf://` names. Folders are searched in sorted order, and those that
            links in them lead to; files of other formats are left out there.
        declared: see `format_of`; of all files, and then folders give all that they have.

    Raises:
        UserError: an input does not exist, matches nothing, or is a file that cannot be read as it is.
        OSError: it is a link to nothing.
    """
    found = Inputs()
    for name in map(str, inputs):
        if name.startswith(HUB):
            found.formats[name] = DATASET
            continue
        matches = [name] if Path(name).exists() else sorted(glob.glob(name, recursive=True))
        if not matches:
            raise UserError(f"{name} does not exist and matches no file; check --input")
        for match in map(Path, matches):
            absolute = str(match.absolute())
            if not match.is_dir():
                found.formats.setdefault(absolute, format_of(match, declared))
            elif is_saved_dataset(match):
                found.formats[absolute] = DATASET
            else:
                _add_folder(Path(absolute), declared, found)
    return found


def describe_counts(counts: Counter[str]) -> str:
    """Counts in words, such as "3 × empty document, 1 × not UTF-8"."""
    return ", ".join(f"{count} × {reason}" for reason, count in sorted(counts.items()))


def _add_folder(folder: Path, declared: str, found: Inputs) -> None:
    texts, known = Counter(), len(found.formats)
    for path in sorted(_files_below(folder, found.left_out), key=lambda path: path.as_posix()):
        if str(path) in found.formats:
            continue
        try:
            found.formats[str(path)] = format_of(path, declared)
            if found.formats[str(path)] == TEXT:
                texts[split_name(path)[0]] += 1
        except FormatError as error:
            found.left_out[error.kind] += 1
        except FileNotFoundError:
            found.left_out["dangling link" if path.is_symlink() else "gone before it was read"] += 1
        except OSError:
            found.left_out["link in a circle" if path.is_symlink() else "unreadable file"] += 1
    if texts.total() < len(found.formats) - known:
        found.beside_tables += texts


def _files_below(folder: Path, left_out: Counter[str]) -> Iterator[Path]:
    """All that is no folder, of each real folder once: links may lead to one twice, or back to where they are."""

    def count_unreadable(_: OSError) -> None:
        left_out["unreadable folder"] += 1

    seen = set()
    for where, folders, files in os.walk(folder, followlinks=True, onerror=count_unreadable):
        status = os.stat(where)
        if (status.st_dev, status.st_ino) in seen:
            left_out["folder that is read by another name"] += 1
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders.sort()
        yield from (Path(where, name) for name in files)
