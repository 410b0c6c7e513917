"""Tokenise a corpus into an indexed dataset, with several processes and the same bytes for any number of them."""

import functools
import multiprocessing
import os
import re
import signal
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from megatron_ponder.data.corpus import describe_skipped, iterate_documents
from megatron_ponder.data.indexed_dataset import IndexedDatasetWriter, dtype_for_vocabulary
from megatron_ponder.data.manifest import Manifest, manifest_path, write_manifest
from megatron_ponder.data.progress import ThroughputDisplay
from megatron_ponder.data.tokenizer import Tokenizer, load_tokenizer
from megatron_ponder.errors import UserError

# A worker gets this much text at a time, enough to make the cost of handing it over small.
CHUNK_CHARACTERS = 1 << 18
# Byte-pair encoding slows down with the length of the text: by a third from this to a whole chunk.
SEGMENT_CHARACTERS = 1 << 14
CHUNKS_IN_FLIGHT_PER_WORKER = 3
# Between a word and the single space after it no tokenizer of the usual kinds has a token.
WORD_END = re.compile(r"(?<=\S)(?= \S)")


class Segment(NamedTuple):
    """A document, or a part of a long one."""

    text: str
    ends_document: bool


class Encoded(NamedTuple):
    """The tokens of a chunk one after another, the number in each segment, and the size of the text."""

    tokens: np.ndarray
    lengths: list[int]
    text_bytes: int


@dataclass(frozen=True)
class PreprocessingReport:
    prefix: Path
    documents: int
    tokens: int
    text_bytes: int
    skipped: Counter[str]
    seconds: float

    def __str__(self) -> str:
        lines = [
            f"{self.prefix}.bin, .idx and .json: {self.documents:,} documents, {self.tokens:,} tokens",
            f"{self.text_bytes / self.tokens:.2f} bytes per token; "
            f"{self.text_bytes / 1e6:.1f} MB in {self.seconds:.1f} s, {self.text_bytes / 1e6 / self.seconds:.1f} MB/s",
        ]
        if self.skipped:
            lines.append(f"skipped: {describe_skipped(self.skipped)}")
        return "\n".join(lines)


def preprocess(
    inputs: Sequence[str | Path],
    output_prefix: str | Path,
    tokenizer_path: str | Path,
    workers: int = 1,
    append_eod: bool = True,
    key: str = "text",
) -> PreprocessingReport:
    """Write `{output_prefix}_{key}_document.bin`, `.idx` and `.json` (the manifest).

    The files appear when all is done; a run that fails leaves an older dataset of that name as it was. Memory holds the
    input file at hand (or its current line, for `.jsonl`) and a few chunks per worker.

    Args:
        inputs, key: the corpus, see `iterate_documents`.
        tokenizer_path: see `load_tokenizer`.
        workers: processes that tokenise; 1 does it in this one.
        append_eod: end each document with the tokenizer's end token.

    Raises:
        UserError: no documents, no tokenizer, or a worker that died.
        OSError: the output cannot be written.
    """
    started = time.perf_counter()
    if workers < 1:
        raise UserError(f"--workers is {workers}: set it to 1 or more")
    tokenizer = load_tokenizer(tokenizer_path)
    end = np.array([tokenizer.eod_id] if append_eod else [], dtype=np.int32)
    prefix = Path(f"{output_prefix}_{key}_document")
    skipped: Counter[str] = Counter()
    documents = tokens = text_bytes = 0

    segments = _segments(iterate_documents(inputs, key, skipped), _cuts_at_word_ends(tokenizer))
    with (
        IndexedDatasetWriter(prefix, dtype_for_vocabulary(tokenizer.vocab_size)) as writer,
        ThroughputDisplay() as show,
    ):
        unfinished: list[np.ndarray] = []
        for chunk, encoded in _in_order(functools.partial(_encode, tokenizer.path), _chunks(segments), workers):
            text_bytes += encoded.text_bytes
            tokens += len(encoded.tokens)
            bounds = np.cumsum(encoded.lengths)[:-1]
            for segment, part in zip(chunk, np.split(encoded.tokens, bounds), strict=True):
                unfinished.append(part)
                if segment.ends_document:
                    writer.add_document(np.concatenate([*unfinished, end]))
                    unfinished.clear()
                    documents += 1
            show.update(documents, text_bytes, tokens)
    # Should writing the new manifest fail, an older one must not stay to describe the wrong tokens.
    manifest_path(prefix).unlink(missing_ok=True)
    manifest = Manifest(
        tokenizer.fingerprint, tokenizer.vocab_size, tokenizer.eod_id, documents, writer.num_tokens, text_bytes
    )
    write_manifest(prefix, manifest)
    seconds = time.perf_counter() - started
    return PreprocessingReport(prefix, documents, writer.num_tokens, text_bytes, skipped, seconds)


def _cuts_at_word_ends(tokenizer: Tokenizer) -> bool:
    """Whether a long text may be encoded in parts; not so for tokenizers that put a space before every text."""
    return tokenizer.encode("one two") == tokenizer.encode("one") + tokenizer.encode(" two")


def _segments(documents: Iterable[str], may_cut: bool) -> Iterator[Segment]:
    """Cut long documents, so that they are encoded faster and a huge file is spread over the workers."""
    for text in documents:
        start = 0
        while may_cut and (end := WORD_END.search(text, start + SEGMENT_CHARACTERS)):
            yield Segment(text[start : end.start()], ends_document=False)
            start = end.start()
        yield Segment(text[start:], ends_document=True)


def _chunks(segments: Iterable[Segment]) -> Iterator[list[Segment]]:
    """Group segments until they have `CHUNK_CHARACTERS`."""
    chunk: list[Segment] = []
    size = 0
    for segment in segments:
        chunk.append(segment)
        size += len(segment.text)
        if size >= CHUNK_CHARACTERS:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _start_worker() -> None:
    # An interrupt from the keyboard reaches every process; only the parent answers it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # A worker never notices by itself that its parent was killed, and would wait for work for ever.
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


@functools.lru_cache(maxsize=1)
def _worker_tokenizer(path: Path) -> Tokenizer:
    return load_tokenizer(path)


def _encode(tokenizer_path: Path, chunk: list[Segment]) -> Encoded:
    tokenizer = _worker_tokenizer(tokenizer_path)
    parts = [np.array(tokenizer.encode(segment.text), dtype=np.int32) for segment in chunk]
    text_bytes = sum(len(segment.text.encode()) for segment in chunk)
    return Encoded(np.concatenate(parts), [len(part) for part in parts], text_bytes)


def _in_order(
    encode: Callable[[list[Segment]], Encoded], chunks: Iterable[list[Segment]], workers: int
) -> Iterator[tuple[list[Segment], Encoded]]:
    """Each chunk with its tokens, in the order given, with a bounded number of them under way."""
    if workers == 1:
        for chunk in chunks:
            yield chunk, encode(chunk)
        return
    # A fresh interpreter per worker: forking one that runs threads (the progress display) can hang.
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=_start_worker)
    try:
        under_way: deque[tuple[list[Segment], Future[Encoded]]] = deque()
        for chunk in chunks:
            under_way.append((chunk, pool.submit(encode, chunk)))
            if len(under_way) >= CHUNKS_IN_FLIGHT_PER_WORKER * workers:
                chunk, future = under_way.popleft()
                yield chunk, future.result()
        for chunk, future in under_way:
            yield chunk, future.result()
    except BrokenProcessPool:
        raise UserError("a worker process died, perhaps for want of memory: set --workers lower") from None
    finally:
        pool.shutdown(cancel_futures=True)
