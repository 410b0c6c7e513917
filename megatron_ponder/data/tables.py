"""Documents from a column of Parquet files and of saved or published `datasets`, a batch of rows at a time."""

import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_ponder.base.errors import UserError
from megatron_ponder.data.text_files import ReadingCounts, TextPart, counting_failures, open_input, split_name

if TYPE_CHECKING:
    import datasets

BATCH_BYTES = 1 << 22
BATCH_ROWS = 1024
HUB = "hf://"


def row_groups(path: Path) -> list[int] | None:
    """Bytes of each row group of a Parquet file, about; None where they cannot be had without reading it.

    Raises:
        UserError: pyarrow is not installed.
    """
    parquet, damaged = _parquet()
    if split_name(path)[1]:
        return None
    try:
        metadata = parquet.read_metadata(path)
    except (damaged, OSError):
        return None
    groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
    return [sum(group.column(at).total_compressed_size for at in range(group.num_columns)) for group in groups]


def parquet_rows(path: Path, key: str, start: int, stop: int | None, tally: ReadingCounts) -> Iterator[TextPart]:
    """Documents of a range of row groups, or of all where `stop` is None."""
    parquet, damaged = _parquet()
    with counting_failures(tally.skipped), open_input(path) as file:
        try:
            if split_name(path)[1]:
                # Parquet is read from its end, which a compressed stream cannot be.
                with tempfile.TemporaryFile() as plain:
                    shutil.copyfileobj(file.stream, plain)
                    file.count(tally)
                    yield from _read_groups(parquet.ParquetFile(plain), key, start, stop, tally, ReadingCounts())
            else:
                source = parquet.ParquetFile(path, buffer_size=BATCH_BYTES)
                yield from _read_groups(source, key, start, stop, tally, tally)
        except damaged:
            tally.skipped["damaged Parquet file"] += 1


def is_saved_dataset(path: Path) -> bool:
    """Whether a folder was written by `save_to_disk`."""
    return (path / "state.json").is_file() or (path / "dataset_dict.json").is_file()


def open_dataset(name: str) -> "datasets.Dataset":
    """A folder that `save_to_disk` wrote, or `hf://owner/name` with `:split` behind it unless that is `train`.

    Raises:
        UserError: `datasets` is not installed, or there is no such dataset, or it cannot be reached.
    """
    try:
        import datasets
    except ImportError:
        raise UserError(f"{name} needs datasets to be read: pip install 'megatron_ponder[data]'") from None
    if not name.startswith(HUB):
        if (Path(name) / "dataset_dict.json").is_file():
            parts = ", ".join(sorted(path.parent.name for path in Path(name).glob("*/state.json")))
            raise UserError(f"{name} holds several datasets; give the folder of one of them ({parts})")
        try:
            return datasets.load_from_disk(name)
        except Exception as error:  # the library raises what the layers below it raise
            raise UserError(f"{name} is not a whole saved dataset ({_first_line(error)}): save it again") from None
    repository, _, split = name.removeprefix(HUB).partition(":")
    try:
        return datasets.load_dataset(repository, split=split or "train")
    except Exception as error:
        raise UserError(
            f"{name} cannot be had from the Hugging Face hub ({_first_line(error)}); check the name and the network, "
            "or give a folder that save_to_disk wrote where there is one"
        ) from None


def dataset_version(dataset: "datasets.Dataset") -> tuple[int, str]:
    """Bytes of the files behind a dataset, and a text that changes with them."""
    stats = [(file["filename"], Path(file["filename"]).stat()) for file in dataset.cache_files]
    version = "|".join(f"{name} {stat.st_size} {stat.st_mtime_ns}" for name, stat in stats)
    return sum(stat.st_size for _, stat in stats), f"{version}|{len(dataset)}"


def dataset_rows(
    dataset: "datasets.Dataset", key: str, start: int, stop: int, size: int, tally: ReadingCounts
) -> Iterator[TextPart]:
    """Documents of a range of rows, which take `size` bytes of the files."""
    if key not in dataset.column_names:
        tally.skipped[f"no text in {key!r}"] += stop - start
        return
    column = dataset.select_columns([key])
    rows = _batch_rows(size, stop - start)
    for at in range(start, stop, rows):
        end = min(at + rows, stop)
        yield from _documents(column[at:end][key], key, tally)
        tally.input_bytes += size * (end - start) // (stop - start) - size * (at - start) // (stop - start)


def _read_groups(
    source, key: str, start: int, stop: int | None, tally: ReadingCounts, read: ReadingCounts
) -> Iterator[TextPart]:
    metadata = source.metadata
    for number in range(start, metadata.num_row_groups if stop is None else stop):
        group = metadata.row_group(number)
        columns = [group.column(at) for at in range(group.num_columns)]
        own = [column for column in columns if column.path_in_schema == key]
        if own:
            rows = _batch_rows(own[0].total_uncompressed_size, group.num_rows)
            for batch in source.iter_batches(rows, row_groups=[number], columns=[key]):
                yield from _documents(_values(batch.column(0)), key, tally)
        else:
            tally.skipped[f"no text in {key!r}"] += group.num_rows
        read.input_bytes += sum(column.total_compressed_size for column in columns)


def _values(column) -> Iterator[str | bytes | None]:
    for value in column:
        try:
            yield value.as_py()
        except UnicodeDecodeError:
            yield b""


def _documents(values: Iterable, key: str, tally: ReadingCounts) -> Iterator[TextPart]:
    for value in values:
        if value == b"":
            tally.skipped["not UTF-8"] += 1
        elif not isinstance(value, str):
            tally.skipped[f"no text in {key!r}"] += 1
        elif value:
            yield TextPart(value, ends_document=True)
        else:
            tally.skipped["empty document"] += 1


def _batch_rows(size: int, rows: int) -> int:
    return max(1, min(BATCH_ROWS, BATCH_BYTES * rows // max(1, size)))


def _parquet():
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise UserError("Parquet files need pyarrow to be read: pip install 'megatron_ponder[data]'") from None
    return parquet, pyarrow.ArrowException


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0][:200] or type(error).__name__
