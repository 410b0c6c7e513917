"""Text to tokens in several processes, in the order of the text."""

import functools
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import NamedTuple

import numpy as np

from megatron_ponder.base.errors import UserError
from megatron_ponder.data.segment_cache import CachedEncoder
from megatron_ponder.data.shards import Shard
from megatron_ponder.data.text_files import ReadingCounts, TextPart
from megatron_ponder.data.tokenizer import load_tokenizer

CHUNKS_IN_FLIGHT_PER_WORKER = 3


class Chunk(NamedTuple):
    """Segments of one shard; without segments, the news that the shard has been read to its end."""

    shard: Shard
    tally: ReadingCounts
    input_bytes: int
    segments: list[TextPart]


class Encoded(NamedTuple):
    """The tokens of a chunk.

    Attributes:
        tokens: one after another, end tokens included.
        counts: int64, tokens of each document or part of one.
        unfinished: the last document goes on in the next chunk.
        text_bytes: size of the text as UTF-8.
    """

    tokens: np.ndarray
    counts: np.ndarray
    unfinished: bool
    text_bytes: int


def encode_parts(tokenizer_path: Path, append_eod: bool, dtype: np.dtype, segments: list[TextPart]) -> Encoded:
    """The tokens of texts, in this process.

    Args:
        tokenizer_path: see `load_tokenizer`; loaded once in a process.
        append_eod: end each document with the tokenizer's end token.
        dtype: of the tokens.
        segments: at least one.
    """
    encoder = _worker_encoder(tokenizer_path, dtype)
    end = np.array([encoder.tokenizer.eod_id], dtype).tobytes() if append_eod else b""
    parts: list[bytes] = []
    counts: list[int] = []
    text_bytes = size = 0
    for segment in segments:
        parts.append(encoder.encode(segment.text))
        size += len(parts[-1])
        text_bytes += len(segment.text) if segment.text.isascii() else len(segment.text.encode())
        if segment.ends_document:
            parts.append(end)
            counts.append((size + len(end)) // dtype.itemsize)
            size = 0
    unfinished = not segments[-1].ends_document
    if unfinished:
        counts.append(size // dtype.itemsize)
    return Encoded(np.frombuffer(b"".join(parts), dtype), np.array(counts, np.int64), unfinished, text_bytes)


def encode_in_order(
    encode: Callable[[list[TextPart]], Encoded], chunks: Iterable[Chunk], workers: int
) -> Iterator[tuple[Chunk, Encoded | None]]:
    """Encode chunks with several processes, of which a bounded number is under way.

    Args:
        encode: the tokens of the segments of a chunk; pickled.
        chunks: read as they are needed.
        workers: processes; 1 encodes in this one.

    Returns:
        Each chunk with its tokens, None for one without segments, in the order given.

    Raises:
        UserError: a worker died.
    """
    if workers == 1:
        for chunk in chunks:
            yield chunk, encode(chunk.segments) if chunk.segments else None
        return
    # A fresh interpreter per worker: forking one that runs threads (the progress display) can hang.
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=_start_worker)
    try:
        under_way: deque[tuple[Chunk, Future[Encoded] | None]] = deque()
        for chunk in chunks:
            under_way.append((chunk, pool.submit(encode, chunk.segments) if chunk.segments else None))
            while len(under_way) >= CHUNKS_IN_FLIGHT_PER_WORKER * workers:
                yield _result(*under_way.popleft())
        while under_way:
            yield _result(*under_way.popleft())
    except BrokenProcessPool:
        # Before Python 3.11.5 the thread that feeds the workers may wait for ever for one to read.
        pool._call_queue._reader.close()
        raise UserError("a worker process died, perhaps for want of memory; set --workers lower") from None
    finally:
        pool.shutdown(cancel_futures=True)


def _result(chunk: Chunk, future: Future[Encoded] | None) -> tuple[Chunk, Encoded | None]:
    return chunk, None if future is None else future.result()


def _start_worker() -> None:
    # An interrupt from the keyboard reaches every process; only the parent answers it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # A worker never notices by itself that its parent was killed, and would wait for work for ever.
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


@functools.lru_cache(maxsize=1)
def _worker_encoder(path: Path, dtype: np.dtype) -> CachedEncoder:
    return CachedEncoder(load_tokenizer(path), dtype)
