"""A corpus cut into shards, each tokenised and made durable by itself, so that no work is done twice.

The shards of a dataset lie in `{prefix}.shards/`, in a folder each that is named by all that decides about its content:
input ranges with sizes and times of change, tokenizer and options. Such a folder appears by one rename when the shard
is whole. Whoever finds it need not ask who wrote it, and when an input changes nobody finds it.
"""

import errno
import hashlib
import json
import secrets
import shutil
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from megatron_ponder.base.errors import UserError
from megatron_ponder.base.files import sync, sync_folder
from megatron_ponder.data.corpus import InputRange
from megatron_ponder.data.token_streams import END, LENGTH, TokenStreams, blocks_of_file

# Changes when the same input would give other tokens or other files than before.
LAYOUT = 1


@dataclass(frozen=True)
class Shard:
    """Ranges of the inputs, in order, that are tokenised together.

    Attributes:
        folder: where it lies once it is finished.
    """

    ranges: tuple[InputRange, ...]
    folder: Path

    @property
    def input_bytes(self) -> int:
        return sum(part.input_bytes for part in self.ranges)

    @property
    def finished(self) -> bool:
        return self.folder.is_dir()


@dataclass(frozen=True)
class ShardReport:
    """What a finished shard says of itself.

    Attributes:
        tokens_sha256: of the tokens of the shard, in hex.
        run: name of the run that wrote it.
    """

    documents: int
    tokens: int
    text_bytes: int
    skipped: dict[str, int]
    tokens_sha256: str
    run: str


def make_shards(ranges: Iterable[InputRange], shard_bytes: int, work: Path, options: str) -> list[Shard]:
    """Group ranges that follow one another until they have `shard_bytes` of input.

    Args:
        work: folder for all shards of a dataset.
        options: all that decides about the tokens besides the input.
    """
    shards: list[Shard] = []
    group: list[InputRange] = []
    size = 0
    for part in ranges:
        group.append(part)
        size += part.input_bytes
        if size >= shard_bytes:
            shards.append(_shard(group, work, options))
            group, size = [], 0
    if group:
        shards.append(_shard(group, work, options))
    return shards


class ShardWriter:
    """Writes a shard aside, under a name that no other process uses.

    Attributes:
        streams: where its tokens go.
    """

    def __init__(self, shard: Shard, dtype: np.dtype) -> None:
        self.shard = shard
        self.text_bytes = 0
        # Drawn, because process ids are not unique among machines, nor host names among containers.
        self._aside = shard.folder.with_name(f"{shard.folder.name}.{secrets.token_hex(8)}.partial")
        self._aside.mkdir()
        self.streams = TokenStreams(*_stream_paths(self._aside), dtype)

    def finish(self, skipped: Counter[str], run: str) -> None:
        """Make the shard durable and give it its name, unless another process was faster."""
        self.streams.sync()
        self.streams.close()
        report = ShardReport(
            self.streams.num_documents,
            self.streams.num_tokens,
            self.text_bytes,
            dict(sorted(skipped.items())),
            self.streams.digest.hexdigest(),
            run,
        )
        with open(_report_path(self._aside), "wb") as file:
            file.write(json.dumps(asdict(report)).encode())
            sync(file)
        sync_folder(self._aside)
        try:
            self._aside.rename(self.shard.folder)
            sync_folder(self.shard.folder.parent)
        except OSError as error:
            self.discard()
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                raise

    def discard(self) -> None:
        """Remove what has been written."""
        self.streams.close()
        shutil.rmtree(self._aside, ignore_errors=True)


def read_report(shard: Shard) -> ShardReport:
    """The report of a finished shard.

    Raises:
        UserError: it is damaged.
    """
    try:
        return ShardReport(**json.loads(_report_path(shard.folder).read_bytes()))
    except (OSError, ValueError, TypeError):
        raise _damaged(shard) from None


def append_shard(streams: TokenStreams, shard: Shard) -> ShardReport:
    """Copy a finished shard to the end of what will be the dataset.

    Raises:
        UserError: it is not what was written once.
    """
    report = read_report(shard)
    tokens, lengths, ends = _stream_paths(shard.folder)
    before = streams.num_tokens, streams.num_documents
    try:
        digest = streams.append(tokens, blocks_of_file(lengths, LENGTH), blocks_of_file(ends, END))
    except (FileNotFoundError, ValueError):
        raise _damaged(shard) from None
    if (digest, streams.num_tokens - before[0], streams.num_documents - before[1]) != (
        report.tokens_sha256,
        report.tokens,
        report.documents,
    ):
        raise _damaged(shard)
    return report


def _stream_paths(folder: Path) -> tuple[Path, Path, Path]:
    return folder / "tokens", folder / "lengths", folder / "documents"


def _report_path(folder: Path) -> Path:
    return folder / "report.json"


def _shard(group: list[InputRange], work: Path, options: str) -> Shard:
    content = json.dumps([LAYOUT, options, [asdict(part) for part in group]])
    return Shard(tuple(group), work / hashlib.sha256(content.encode()).hexdigest()[:32])


def _damaged(shard: Shard) -> UserError:
    return UserError(f"{shard.folder} is damaged; remove it and start again, which makes this part of the dataset anew")
