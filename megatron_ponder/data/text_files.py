"""Documents from plain, JSON Lines and compressed files, read as streams however large they are."""

import bz2
import codecs
import gzip
import io
import itertools
import json
import lzma
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, NamedTuple

from megatron_ponder.base.errors import UserError

COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")
DAMAGE = (EOFError, zlib.error, gzip.BadGzipFile, lzma.LZMAError)
READING_FAILS = (*DAMAGE, OSError)
BLOCK_BYTES = 1 << 22
# A line has to be in memory as a whole to be parsed.
LONGEST_LINE = 1 << 28
# Little at a time, because a block of zeros grows ten thousandfold.
COMPRESSED_BLOCK = 1 << 14


class TextPart(NamedTuple):
    """A document, or a part of a long one."""

    text: str
    ends_document: bool


@dataclass
class ReadingCounts:
    """What reading has come to so far.

    Attributes:
        skipped: what could not be used, by reason.
        input_bytes: of the files as they are, compressed or not.
    """

    skipped: Counter[str] = field(default_factory=Counter)
    input_bytes: int = 0


def split_name(path: Path) -> tuple[str, str]:
    """Suffix of the format and suffix of the compression in small letters, such as (".jsonl", ".gz"), or empty."""
    suffix = path.suffix.lower()
    if suffix in COMPRESSIONS:
        return path.with_suffix("").suffix.lower(), suffix
    return suffix, ""


class Input:
    """An open file, decompressed as it is read.

    Attributes:
        stream: what the file holds.
    """

    def __init__(self, path: Path, raw: BinaryIO) -> None:
        _, compression = split_name(path)
        self._raw = raw
        self._counted = 0
        if compression == ".gz":
            self.stream: BinaryIO = gzip.GzipFile(fileobj=raw)
        elif compression == ".bz2":
            self.stream = bz2.BZ2File(raw)
        elif compression == ".xz":
            self.stream = lzma.LZMAFile(raw)  # noqa: SIM115, it is raw that has to be closed
        elif compression == ".zst":
            self.stream = io.BufferedReader(_ZstandardStream(raw, path), BLOCK_BYTES)
        else:
            self.stream = raw

    def count(self, tally: ReadingCounts) -> None:
        """Add what has been read from the file since the last call."""
        position = self._raw.tell()
        tally.input_bytes += position - self._counted
        self._counted = position

    def blocks(self) -> Iterator[bytes]:
        """The rest, in full blocks."""
        while block := self.stream.read(BLOCK_BYTES):
            yield block


@contextmanager
def open_input(path: Path) -> Iterator[Input]:
    """Open a file for reading, whatever its compression."""
    with open(path, "rb") as raw:
        yield Input(path, raw)


@contextmanager
def counting_failures(skipped: Counter[str]) -> Iterator[None]:
    """Count what keeps the rest of a file from being read, instead of raising it."""
    try:
        yield
    except DAMAGE:
        skipped["damaged compressed file"] += 1
    except OSError as error:
        # The system gives numbers to its errors, and bzip2 none to its own.
        skipped["damaged compressed file" if error.errno is None else "unreadable file"] += 1


def whole_text(path: Path, tally: ReadingCounts) -> Iterator[TextPart]:
    """A file as one document, in parts if it is large."""
    is_large = False
    with counting_failures(tally.skipped), open_input(path) as file:
        blocks = file.blocks()
        first, second = next(blocks, b""), next(blocks, b"")
        if not second:
            yield from _small_text(first, tally)
            file.count(tally)
        elif _is_utf8(itertools.chain([first, second], blocks)):
            is_large = True
        else:
            tally.skipped["not UTF-8"] += 1
    # Half a document cannot be taken back, so all of a large one has been checked before any of it is used.
    if is_large:
        try:
            yield from _large_text(path, tally)
        except (*READING_FAILS, UnicodeDecodeError):
            raise UserError(f"{path} changed while it was read; start again when nothing writes to it") from None


def json_lines(path: Path, key: str, start: int, stop: int | None, tally: ReadingCounts) -> Iterator[TextPart]:
    """Documents of the lines that begin in a range of bytes, or of all lines where `stop` is None."""
    with counting_failures(tally.skipped), open_input(path) as file:
        for line in _lines(file, start, stop, tally):
            text = _parse(line, key, tally.skipped)
            if text:
                yield TextPart(text, ends_document=True)
            elif text is not None:
                tally.skipped["empty document"] += 1


def _small_text(content: bytes, tally: ReadingCounts) -> Iterator[TextPart]:
    try:
        # Bytes, because text mode would turn "\r\n" into "\n".
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        tally.skipped["not UTF-8"] += 1
        return
    if text:
        yield TextPart(text, ends_document=True)
    else:
        tally.skipped["empty document"] += 1


def _large_text(path: Path, tally: ReadingCounts) -> Iterator[TextPart]:
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    with open_input(path) as file:
        for block in file.blocks():
            file.count(tally)
            yield TextPart(decoder.decode(block), ends_document=False)
    yield TextPart(decoder.decode(b"", final=True), ends_document=True)


def _is_utf8(blocks: Iterable[bytes]) -> bool:
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        for block in blocks:
            decoder.decode(block)
        decoder.decode(b"", final=True)
    except UnicodeDecodeError:
        return False
    return True


def _lines(file: Input, start: int, stop: int | None, tally: ReadingCounts) -> Iterator[bytes]:
    """Lines that are not blank and begin in the range, without a byte order mark at the beginning of the file."""
    stream = file.stream
    position = start
    if start > 0:
        # The line that the byte before belongs to is the business of the range before.
        stream.seek(start - 1)
        file.count(ReadingCounts())
        position = start - 1 + _skip_line(stream)
    while stop is None or position < stop:
        line = stream.readline(LONGEST_LINE)
        if not line:
            return
        size = len(line)
        if size == LONGEST_LINE and not line.endswith(b"\n"):
            size += _skip_line(stream)
            tally.skipped[f"line over {LONGEST_LINE >> 20} MiB"] += 1
            line = b""
        if position == 0:
            line = line.removeprefix(codecs.BOM_UTF8)
        position += size
        file.count(tally)
        if line.strip():
            yield line


def _skip_line(stream: BinaryIO) -> int:
    """Read to the next line's beginning and say how many bytes that took."""
    skipped = 0
    while part := stream.readline(BLOCK_BYTES):
        skipped += len(part)
        if part.endswith(b"\n"):
            break
    return skipped


def _parse(line: bytes, key: str, skipped: Counter[str]) -> str | None:
    try:
        text = json.loads(line.decode("utf-8"))[key]
        text.encode("utf-8")
    except UnicodeDecodeError:
        skipped["not UTF-8"] += 1
    except UnicodeEncodeError:
        skipped["half a surrogate pair"] += 1
    except (ValueError, RecursionError):
        skipped["malformed JSON"] += 1
    except (KeyError, TypeError, AttributeError, IndexError):
        skipped[f"no text in {key!r}"] += 1
    else:
        return text
    return None


class _ZstandardStream(io.RawIOBase):
    """Decompressed content of one or more frames; unlike the library's own, it tells a file that was cut short."""

    def __init__(self, raw: BinaryIO, path: Path) -> None:
        try:
            import zstandard
        except ImportError:
            raise UserError(f"{path} needs zstandard to be read: pip install 'megatron_ponder[data]'") from None
        self._new_frame = zstandard.ZstdDecompressor().decompressobj
        self._error = zstandard.ZstdError
        self._raw = raw
        self._frame = self._new_frame()
        self._in_frame = False
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        while not self._ready:
            compressed = self._leftover() or self._raw.read(COMPRESSED_BLOCK)
            if not compressed:
                if self._in_frame:
                    raise EOFError("a frame is cut short")
                return 0
            try:
                self._ready = memoryview(self._frame.decompress(compressed))
            except self._error as error:
                raise EOFError(str(error)) from None
            self._in_frame = not self._frame.eof
        size = min(len(buffer), len(self._ready))
        buffer[:size] = self._ready[:size]
        self._ready = self._ready[size:]
        return size

    def _leftover(self) -> bytes:
        """What the last block held beyond the end of a frame, which the next frame begins with."""
        if not self._frame.eof:
            return b""
        unused = self._frame.unused_data
        self._frame = self._new_frame()
        return unused
