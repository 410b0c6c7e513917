"""Measurements of a step: where its time goes, how well the device is used, how much memory is taken.

Nothing here waits for a device in the middle of a step. On a GPU times are those of events on its stream, read when the
step has ended.
"""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from megatron_ponder.cluster.gpus import known_gpu
from megatron_ponder.config import Config
from megatron_ponder.parallel.mesh import Mesh
from megatron_ponder.training.stragglers import Stragglers, slowest_fields

GIB = 2**30
_STATM = Path("/proc/self/statm")
PARTS = ("data", "forward_backward", "optimizer")
# Fields of a record that depend on the machine and not on the training run.
MEASURED = frozenset(
    {"time", "step_seconds", "tokens_per_second", "slots_per_second", "data_wait", "model_flops_per_second", "mfu"}
    | {"memory_allocated", "memory_reserved", "memory_resident", "slowest_rank", "slowest_over_median"}
    | {f"{part}_seconds" for part in PARTS}
)


class _Clock:
    """Moments on the CPU, or on a GPU's stream."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"

    def now(self) -> "float | torch.cuda.Event":
        """A moment, to be compared when the device has passed it."""
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between(self, start, end) -> float:
        """Seconds from one moment to another; waits until the device has passed the second."""
        if not self._on_gpu:
            return end - start
        end.synchronize()
        return start.elapsed_time(end) / 1e3


class StepWatch:
    """Measures every step of a run, on every rank."""

    def __init__(self, config: Config, mesh: Mesh, transformer: nn.Module) -> None:
        """Begin to watch; a collective of all ranks.

        Args:
            config: resolved, with a vocabulary size.
            mesh: the ranks.
            transformer: the blocks of this rank, whose forward passes are timed.
        """
        self._mesh, self._clock = mesh, _Clock(mesh.device)
        self._spans, self._forwards = [], []
        self._peak = None
        if mesh.device.type == "cuda":
            gpu = known_gpu(torch.cuda.get_device_name(mesh.device))
            self._peak = gpu and gpu.peak(config.training.precision)
        share = len(transformer.blocks) * mesh.pipeline.size / config.model.num_layers
        logging = config.logging
        self._stragglers = Stragglers(logging.straggler_interval, logging.straggler_factor, share, mesh.device)
        transformer.register_forward_pre_hook(lambda *_: self._forwards.append([self._clock.now()]))
        transformer.register_forward_hook(lambda *_: self._forwards[-1].append(self._clock.now()))

    def begin(self) -> None:
        """A step begins."""
        self._start, self._spans, self._forwards = self._clock.now(), [], []

    def mark(self) -> None:
        """The next of `PARTS` has ended."""
        now = self._clock.now()
        self._spans.append((self._start, now))
        self._start = now

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Leave what is done in the block out of the step, between two of its parts."""
        forwards = len(self._forwards)
        yield
        del self._forwards[forwards:]
        self._start = self._clock.now()

    def end(self, flops: float, slots: float, tokens: int) -> tuple[dict[str, float], str | None]:
        """The step has ended, and everybody knows its loss.

        Args:
            flops: of its algorithm, over all ranks.
            slots: that were run, over all ranks.
            tokens: of the global batch.

        Returns:
            Fields of the record, and what is to be said of slow ranks, if anything.
        """
        self.mark()
        spans = [self._clock.between(*span) for span in self._spans]
        parts = dict(zip(PARTS, spans, strict=False))
        fields = self._fields(parts, sum(spans), flops, slots, tokens)
        blocks = sum(self._clock.between(*pair) for pair in self._forwards)
        times = self._stragglers.add(parts["data"], blocks)
        if times is None:
            return fields, None
        return fields | slowest_fields(times), self._stragglers.report(times)

    def close(self) -> None:
        """Wait for what ranks were telling each other."""
        self._stragglers.finish()

    def _fields(
        self, parts: dict[str, float], seconds: float, flops: float, slots: float, tokens: int
    ) -> dict[str, float]:
        """Fields of the record that are measured on this rank.

        Args:
            parts: seconds of each of `PARTS`.
            seconds: of the step.
            flops: of its algorithm, over all ranks.
            slots: that were run, over all ranks.
            tokens: of the global batch.
        """
        rate = flops / seconds
        fields = {
            "time": time.time(),
            "step_seconds": seconds,
            "tokens_per_second": tokens / seconds,
            "slots_per_second": slots / seconds,
            **{f"{part}_seconds": parts[part] for part in PARTS},
            "data_wait": parts["data"] / seconds,
            "model_flops": flops,
            "model_flops_per_second": rate,
            **self._memory(),
        }
        if self._peak is not None:
            fields["mfu"] = rate / (self._mesh.size * self._peak)
        return fields

    def _memory(self) -> dict[str, float]:
        """GiB of this rank: peaks of PyTorch's allocator since the start, or what is resident now."""
        if self._mesh.device.type == "cuda":
            return {
                "memory_allocated": torch.cuda.max_memory_allocated() / GIB,
                "memory_reserved": torch.cuda.max_memory_reserved() / GIB,
            }
        if not _STATM.exists():  # not Linux
            return {}
        pages = int(_STATM.read_text().split()[1])
        return {"memory_resident": pages * os.sysconf("SC_PAGE_SIZE") / GIB}
