"""A corpus cut into ranges that can be read apart from each other, and the documents of a range."""

import functools
import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_ponder.base.errors import UserError
from megatron_ponder.data.formats import ENDINGS, LINES, PARQUET
from megatron_ponder.data.inputs import DATASET, Inputs, describe_counts
from megatron_ponder.data.tables import (
    dataset_rows,
    dataset_version,
    open_dataset,
    parquet_rows,
    row_groups,
)
from megatron_ponder.data.text_files import ReadingCounts, TextPart, json_lines, split_name, whole_text


@dataclass(frozen=True)
class InputRange:
    """Part of an input.

    Attributes:
        name: path of a file or of a saved dataset, absolute; or a dataset's name on the hub.
        format: see `Inputs`.
        start, stop: bytes of JSON lines, row groups of a Parquet file, rows of a dataset. `stop` is None for all of a
            file that can only be read from the beginning.
        input_bytes: how much of the input it is, compressed or not.
        version: changes when the input does.
    """

    name: str
    format: str
    start: int
    stop: int | None
    input_bytes: int
    version: str


def cut_inputs(inputs: Inputs, range_bytes: int) -> Iterator[InputRange]:
    """Ranges of about `range_bytes` each where an input can be cut, else whole inputs.

    They depend on the inputs and on `range_bytes` alone. A file that is gone by now is a range all the same.

    Raises:
        UserError: an input needs a package that is not installed.
    """
    for name, form in inputs.formats.items():
        path = Path(name)
        if form == DATASET:
            dataset = _open_dataset(name)
            size, version = dataset_version(dataset)
            version = hashlib.sha256(version.encode()).hexdigest()
            whole = InputRange(name, form, 0, len(dataset), size, version)
            yield from _equal_ranges(whole, range_bytes)
            continue
        try:
            stat = path.stat()
            size, version = stat.st_size, f"{stat.st_size} {stat.st_mtime_ns}"
        except OSError:
            size, version = 0, ""
        if form == LINES and not split_name(path)[1]:
            yield from _equal_ranges(InputRange(name, form, 0, size, size, version), range_bytes)
        elif form == PARQUET and (groups := row_groups(path)):
            yield from _group_ranges(InputRange(name, form, 0, len(groups), size, version), groups, range_bytes)
        else:
            yield InputRange(name, form, 0, None, size, version)


def read_range(part: InputRange, key: str, tally: ReadingCounts) -> Iterator[TextPart]:
    """The documents of a range, a large plain file's in parts.

    Args:
        key: field of a JSON line, or column of a table, that holds the text.
        tally: follows the reading.

    Raises:
        UserError: see `cut_inputs`.
    """
    path = Path(part.name)
    if part.format == DATASET:
        dataset = _open_dataset(part.name)
        yield from dataset_rows(dataset, key, part.start, part.stop, part.input_bytes, tally)
    elif part.format == LINES:
        yield from json_lines(path, key, part.start, part.stop, tally)
    elif part.format == PARQUET:
        yield from parquet_rows(path, key, part.start, part.stop, tally)
    else:
        yield from whole_text(path, tally)


def read_corpus(inputs: Inputs, key: str, tally: ReadingCounts) -> Iterator[TextPart]:
    """All documents in a fixed order: one per JSON line or row of a table, one per other file; large ones in parts.

    Raises:
        UserError: there is not one usable document in all of them; see `cut_inputs` too.
    """
    found = False
    for part in cut_inputs(inputs, range_bytes=1 << 62):
        for segment in read_range(part, key, tally):
            found = True
            yield segment
    if not found:
        raise no_documents(tally.skipped, inputs)


def no_documents(skipped: Counter[str], inputs: Inputs) -> UserError:
    """What to say of a corpus without a usable document."""
    unusable = f"skipped: {describe_counts(skipped)}" if skipped else ""
    reasons = "; ".join(filter(None, (unusable, inputs.describe_left_out())))
    return UserError(
        f"no documents in the input{reasons and f' ({reasons})'}; give UTF-8 text or tables ({', '.join(ENDINGS)}), "
        "or another --key for JSON lines and tables"
    )


def _equal_ranges(whole: InputRange, range_bytes: int) -> Iterator[InputRange]:
    """Cut bytes or rows evenly."""
    units, size = whole.stop, whole.input_bytes
    step = max(1, units * range_bytes // max(1, size))
    for start in range(0, max(1, units), step):
        stop = min(start + step, units)
        part = size * stop // max(1, units) - size * start // max(1, units)
        yield replace(whole, start=start, stop=stop, input_bytes=part)


def _group_ranges(whole: InputRange, groups: list[int], range_bytes: int) -> Iterator[InputRange]:
    start = size = 0
    for number, group in enumerate(groups):
        size += group
        if size >= range_bytes or number == len(groups) - 1:
            yield replace(whole, start=start, stop=number + 1, input_bytes=size)
            start, size = number + 1, 0


@functools.lru_cache(maxsize=2)
def _open_dataset(name: str):
    return open_dataset(name)
