"""Micro-batches of one data-parallel rank, in an order that does not depend on how the work is divided."""

import signal
import traceback
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing
from itertools import islice

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from megatron_ponder.base.errors import UserError, describe
from megatron_ponder.data.dataset import Share
from megatron_ponder.data.mixture import Samples

WHOLE = Share()


def batches(
    dataset: Samples,
    consumed_samples: int,
    global_batch_size: int | Callable[[int], int],
    micro_batch_size: int,
    data_rank: int,
    data_size: int,
    num_workers: int = 0,
    pin_memory: bool = False,
    vocab_size: int | None = None,
    share: Share = WHOLE,
) -> Generator[list[Tensor], None, None]:
    """Micro-batches of this rank without end, those of each optimiser step as a list; int64 (micro_batch_size, S + 1).

    A step uses the positions that follow those of the step before. Rank r takes the r-th of `data_size` equal blocks of
    them, so that the ranks together read the same samples for any `data_size` and `micro_batch_size`.

    Args:
        consumed_samples: samples used by all ranks before, 0 for a new run.
        global_batch_size: samples of a step over all ranks, always, or by the samples used before it.
        data_rank, data_size: place of this process among those that read different data.
        num_workers: processes that read ahead; 0 reads in this one. They end when the iterator is closed, and ignore
            the signals of which Python's exit would have them die, so that whoever leaves it open waits for ever.
        pin_memory: put batches in page-locked memory, from which copies to a GPU are asynchronous.
        vocab_size: every id has to be below it; None for any ids.
        share: of the S tokens of every sample, which is all that is read of them but for the token behind it.

    Raises:
        UserError: a sample cannot be read, or has an id that the model does not know.
        RuntimeError: reading has failed by a bug, whose traceback is in it, or a process that reads has died.
    """
    size_at = global_batch_size if callable(global_batch_size) else lambda _: global_batch_size
    own = (consumed_samples, size_at, data_rank, data_size)
    positions = (
        range(at, at + micro_batch_size)
        for block in _blocks(*own)
        for at in range(block.start, block.stop, micro_batch_size)
    )
    with closing(_read(_loader(dataset, share, positions, vocab_size, num_workers, pin_memory))) as micro_batches:
        for block in _blocks(*own):
            assert len(block) % micro_batch_size == 0
            yield list(islice(micro_batches, len(block) // micro_batch_size))


def _blocks(consumed: int, size_at: Callable[[int], int], rank: int, ranks: int) -> Iterator[range]:
    """The positions of this rank in every step, without end."""
    while True:
        size = size_at(consumed)
        assert size % ranks == 0
        block = size // ranks
        yield range(consumed + rank * block, consumed + (rank + 1) * block)
        consumed += size


def validation_batches(
    dataset: Samples,
    samples: int,
    micro_batch_size: int,
    data_rank: int,
    data_size: int,
    vocab_size: int | None = None,
    share: Share = WHOLE,
) -> Iterator[Tensor]:
    """Micro-batches of this rank's part of the first `samples` samples, int64 (at most micro_batch_size, S + 1) each.

    Together the ranks read each position exactly once. Where the division leaves a rest, a rank's last micro-batch is
    smaller, and a rank may have one less than another, or none.

    Raises:
        UserError, RuntimeError: see `batches`.
    """
    stop = samples * (data_rank + 1) // data_size
    starts = range(samples * data_rank // data_size, stop, micro_batch_size)
    positions = (range(at, min(at + micro_batch_size, stop)) for at in starts)
    return _read(_loader(dataset, share, positions, vocab_size, num_workers=0, pin_memory=False))


def _read(loader: DataLoader) -> Generator[Tensor, None, None]:
    failure: Exception | None = None
    try:
        for content in loader:
            if isinstance(content, Exception):
                failure = content
                break
            yield content
    except OSError as error:  # no process could be started, say
        failure = UserError(describe(error))
    except Exception as error:
        failure = RuntimeError(f"reading ahead has failed: {error}")
    # Out here nothing holds the loader any more. Its processes end with it, and a traceback through it would keep them,
    # for which this process waits at its end.
    if failure is not None:
        raise failure


def _loader(
    dataset: Samples,
    share: Share,
    positions: Iterable[range],
    vocab_size: int | None,
    num_workers: int,
    pin_memory: bool,
) -> DataLoader:
    return DataLoader(
        _Careful(dataset, share, vocab_size),
        batch_sampler=positions,
        num_workers=num_workers,
        collate_fn=_stack,
        pin_memory=pin_memory,
        worker_init_fn=_prepare_worker,
        # Whatever Python's default is: forked, they share the memory of the order of the samples, and notice when this
        # process is killed, which those of a fork server do not.
        multiprocessing_context="fork" if num_workers else None,
        # Its own, because a loader draws a number when it starts and would move the global generator.
        generator=torch.Generator(),
    )


class _Careful(Dataset):
    """Gives what has gone wrong in place of samples, as an error to raise, for which no process waits: see `_read`."""

    def __init__(self, samples: Samples, share: Share, vocab_size: int | None) -> None:
        self._samples, self._share, self._vocab_size = samples, share, vocab_size

    def __getitems__(self, positions: range) -> list[np.ndarray] | Exception:
        try:
            content = [self._samples.read(position, self._share) for position in positions]
            if self._vocab_size is not None:
                self._check_ids(positions, content)
            return content
        except (UserError, OSError) as error:
            return UserError(describe(error))
        except Exception as error:
            what = f"reading samples {positions.start:,} to {positions[-1]:,} has failed"
            return RuntimeError(f"{what}: {type(error).__name__}: {error}\n{traceback.format_exc()}")

    def _check_ids(self, positions: range, content: list[np.ndarray]) -> None:
        """Refuse samples with ids that the model cannot embed, which a dataset gets when its file is damaged."""
        bad = [
            (position, int(tokens.min() if tokens.min() < 0 else tokens.max()))
            for position, tokens in zip(positions, content, strict=True)
            if tokens.min() < 0 or tokens.max() >= self._vocab_size
        ]
        if bad:
            (first, token), *others = bad
            named = "".join(f", {position:,}" for position, _ in others)
            raise UserError(
                f"sample {first:,} ({self._samples.describe(first)}) has the token id {token}, and the model knows 0 "
                f"to {self._vocab_size - 1}{f'; so have samples{named[1:]}' if named else ''}: the dataset is damaged; "
                "look at it with ponder inspect-dataset --verify, and make it again"
            )


def _stack(samples: list[np.ndarray] | Exception) -> Tensor | Exception:
    return samples if isinstance(samples, Exception) else torch.from_numpy(np.stack(samples))


def _prepare_worker(worker: int) -> None:
    # Denormal numbers are many times slower than others, and each process has to be told.
    torch.set_flush_denormal(True)
    # What reaches all processes of a job is for training to answer, which still needs its next batch.
    for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
