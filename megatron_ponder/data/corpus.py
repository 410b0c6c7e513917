"""What `--input` names, cut into ranges that can be read apart from each other, and the documents of a range."""

import functools
import glob
import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_ponder.data.tables import (
    HUB,
    dataset_rows,
    dataset_version,
    is_saved_dataset,
    open_dataset,
    parquet_rows,
    row_groups,
)
from megatron_ponder.data.text_files import COMPRESSIONS, Segment, Tally, json_lines, split_name, whole_text
from megatron_ponder.errors import UserError

FORMATS = (".txt", ".md", ".rst", ".py", ".jsonl", ".parquet")


@dataclass(frozen=True)
class InputRange:
    """Part of an input.

    Attributes:
        name: path of a file or of a saved dataset, absolute; or a dataset's name on the hub.
        start, stop: bytes of a `.jsonl` file, row groups of a `.parquet` file, rows of a dataset. `stop` is None for
            all of a file that can only be read from the beginning.
        input_bytes: how much of the input it is, compressed or not.
        version: changes when the input does.
    """

    name: str
    start: int
    stop: int | None
    input_bytes: int
    version: str


def find_inputs(inputs: Sequence[str | Path]) -> list[str]:
    """Files, saved datasets and names on the hub, each once, in the order they are read.

    Args:
        inputs: files, folders (searched for `FORMATS`, compressed or not, sorted), glob patterns and `hf://` names.

    Raises:
        UserError: an input does not exist or matches nothing.
    """
    found: dict[str, None] = {}
    for name in map(str, inputs):
        if name.startswith(HUB):
            found[name] = None
            continue
        matches = [name] if Path(name).exists() else sorted(glob.glob(name, recursive=True))
        if not matches:
            raise UserError(f"{name} does not exist and matches no file: check --input")
        for match in map(Path, matches):
            is_folder = match.is_dir() and not is_saved_dataset(match)
            paths = _in_folder(match) if is_folder else [match]
            found.update(dict.fromkeys(str(path.absolute()) for path in paths))
    return list(found)


def cut_inputs(inputs: Sequence[str | Path], range_bytes: int) -> Iterator[InputRange]:
    """Ranges of about `range_bytes` each where an input can be cut, else whole inputs; see `find_inputs`.

    They depend on the inputs and on `range_bytes` alone. A file that is gone by now is a range all the same.

    Raises:
        UserError: an input does not exist, or needs a package that is not installed.
    """
    for name in find_inputs(inputs):
        path = Path(name)
        if name.startswith(HUB) or path.is_dir():
            dataset = _open_dataset(name)
            size, version = dataset_version(dataset)
            version = hashlib.sha256(version.encode()).hexdigest()
            yield from _equal_ranges(name, len(dataset), size, range_bytes, version)
            continue
        try:
            stat = path.stat()
            size, version = stat.st_size, f"{stat.st_size} {stat.st_mtime_ns}"
        except OSError:
            size, version = 0, ""
        suffix, compression = split_name(path)
        if suffix == ".jsonl" and not compression:
            yield from _equal_ranges(name, size, size, range_bytes, version)
        elif suffix == ".parquet" and (groups := row_groups(path)):
            yield from _group_ranges(name, groups, range_bytes, version)
        else:
            yield InputRange(name, 0, None, size, version)


def read_range(part: InputRange, key: str, tally: Tally) -> Iterator[Segment]:
    """The documents of a range, a large plain file's in parts.

    Args:
        key: field of a JSON line, or column of a table, that holds the text.
        tally: follows the reading.

    Raises:
        UserError: see `cut_inputs`.
    """
    path = Path(part.name)
    suffix, _ = split_name(path)
    if part.name.startswith(HUB) or path.is_dir():
        dataset = _open_dataset(part.name)
        yield from dataset_rows(dataset, key, part.start, part.stop, part.input_bytes, tally)
    elif suffix == ".jsonl":
        yield from json_lines(path, key, part.start, part.stop, tally)
    elif suffix == ".parquet":
        yield from parquet_rows(path, key, part.start, part.stop, tally)
    else:
        yield from whole_text(path, tally)


def read_corpus(inputs: Sequence[str | Path], key: str, tally: Tally) -> Iterator[Segment]:
    """All documents in a fixed order: one per JSON line or row of a table, one per other file; large ones in parts.

    Raises:
        UserError: an input does not exist, or there is not one usable document in all of them.
    """
    found = False
    for part in cut_inputs(inputs, range_bytes=1 << 62):
        for segment in read_range(part, key, tally):
            found = True
            yield segment
    if not found:
        raise no_documents(tally.skipped)


def no_documents(skipped: Counter[str]) -> UserError:
    """What to say of a corpus without a usable document."""
    reasons = f" (skipped: {describe_skipped(skipped)})" if skipped else ""
    return UserError(
        f"no documents in the input{reasons}: give UTF-8 text or tables ({', '.join(FORMATS)}), "
        "or another --key for .jsonl and tables"
    )


def describe_skipped(skipped: Counter[str]) -> str:
    """For example "3 × empty document, 1 × not UTF-8"."""
    return ", ".join(f"{count} × {reason}" for reason, count in sorted(skipped.items()))


def _in_folder(folder: Path) -> list[Path]:
    suffixes = {*FORMATS, *COMPRESSIONS}
    files = (
        path
        for path in folder.rglob("*")
        if path.suffix in suffixes and split_name(path)[0] in FORMATS and path.is_file()
    )
    return sorted(files, key=lambda path: path.as_posix())


def _equal_ranges(name: str, units: int, size: int, range_bytes: int, version: str) -> Iterator[InputRange]:
    """Cut bytes or rows evenly."""
    step = max(1, units * range_bytes // max(1, size))
    for start in range(0, max(1, units), step):
        stop = min(start + step, units)
        yield InputRange(name, start, stop, size * stop // max(1, units) - size * start // max(1, units), version)


def _group_ranges(name: str, groups: list[int], range_bytes: int, version: str) -> Iterator[InputRange]:
    start = size = 0
    for number, group in enumerate(groups):
        size += group
        if size >= range_bytes or number == len(groups) - 1:
            yield InputRange(name, start, number + 1, size, version)
            start, size = number + 1, 0


@functools.lru_cache(maxsize=2)
def _open_dataset(name: str):
    return open_dataset(name)
