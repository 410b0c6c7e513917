"""Saving the state of a run, all ranks together, and finding the state to go on from."""

import logging
import shutil
import time
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_ponder.base.errors import UserError
from megatron_ponder.checkpoint.folders import (
    checkpoint_name,
    note_export,
    partial_folder,
    partial_folders_in,
    point_latest,
    retain,
)
from megatron_ponder.checkpoint.manifest import Manifest
from megatron_ponder.checkpoint.run_state import RunState
from megatron_ponder.checkpoint.tensor_files import write_tensors
from megatron_ponder.checkpoint.writer import publish, write_description
from megatron_ponder.config import Config
from megatron_ponder.config.layout import spoken_axes
from megatron_ponder.config.parallel import AXES
from megatron_ponder.parallel.collectives import together
from megatron_ponder.parallel.groups import host_group
from megatron_ponder.parallel.mesh import Mesh
from megatron_ponder.training.exporter import Exporter
from megatron_ponder.training.shares import shared_out
from megatron_ponder.training.state import StateTensor

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Share:
    """The part of a checkpoint that one rank writes.

    Attributes:
        tensors: by `kind/parameter name`.
        stage: keys of all tensors of its pipeline stage, on the first rank of the stage; else none.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    stage: list[str] = field(default_factory=list)


def _to_host(whole: Tensor, buffer: Tensor | None) -> Tensor:
    """A copy in a buffer, or in one that is made: page-locked, so that a GPU goes on while it copies."""
    if buffer is None:
        buffer = torch.empty(whole.shape, pin_memory=whole.is_cuda)
    return buffer.copy_(whole, non_blocking=whole.is_cuda)


class Checkpointer:
    """Writes the checkpoints of one run folder.

    A checkpoint is written aside by all ranks, each a share of the tensors; when all have said that theirs is on the
    disk it gets its name, then `latest` moves, then old ones go. Whatever fails before leaves the last one in place.

    An asynchronous save does the same in a thread, from a copy of this rank's share. The ranks then agree over a
    process group of their own, so that what they say never comes between the collectives of training. There is at
    most one save under way. Leave the block of this context manager, or call `finish`, before the run ends.

    Attributes:
        folder: of the checkpoints.
        seconds: that the longest save so far has taken on this rank; None before the first.
    """

    def __init__(
        self,
        config: Config,
        tokenizer: Path | None,
        fingerprints: tuple[str | None, str | None],
        mesh: Mesh,
    ) -> None:
        """Prepare to save; a collective.

        Args:
            config: resolved; stored with every checkpoint.
            tokenizer: to copy into every checkpoint.
            fingerprints: of the dataset and of the tokenizer.
            mesh: the ranks.
        """
        self._config, self._tokenizer, self._fingerprints = config, tokenizer, fingerprints
        self._mesh = mesh
        self.folder = Path(config.training.run_dir) / "checkpoints"
        self._group, self._thread = None, None
        if config.checkpoint.asynchronous:
            self._group = host_group()
            self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._exporter = None if config.checkpoint.export_hf == "none" else together(self._new_exporter)
        self._under_way: Future | None = None
        self._copy = _Share()
        self.seconds: float | None = None

    def __enter__(self) -> "Checkpointer":
        if self._exporter is not None:
            self._exporter.begin_all_due(self.folder)
        return self

    def __exit__(self, exception_type, exception, traceback) -> None:
        if self._thread is not None:
            self._thread.shutdown()  # waits: the checkpoint is worth having, whatever has ended the training
        if self._exporter is not None:
            self._exporter.cut_off()  # what is left of it where the run has not waited
        if exception is None:
            self.finish()  # else a failure of the save would hide the reason

    def save(self, tensors: Iterable[StateTensor], state: RunState) -> Path:
        """Write a checkpoint, or begin to; a collective.

        An asynchronous save returns when everything has been copied, and training may change it.

        Args:
            tensors: of this rank's pipeline stage, in the order of all of its ranks; taking one may be a collective.
            state: of the run.

        Returns:
            The checkpoint's folder, which an asynchronous save has yet to make.

        Raises:
            UserError: on every rank, if any rank could not write its part. That an asynchronous save has failed is told
                at once on rank 0, and raised by `finish` if no other has been begun since.
        """
        with suppress(UserError):
            self.finish()
        final = self.folder / checkpoint_name(state.step)
        manifest = Manifest(deepcopy(state), *self._fingerprints, layout=self._layout())
        begun = time.monotonic()
        share = self._take_share(tensors)
        if self._thread is not None or self._mesh.device.type == "cuda":
            self._copy = share
        if self._thread is None:
            self._write(share, manifest, final, begun)
        else:
            self._under_way = self._thread.submit(self._write_behind, share, manifest, final, begun)
        return final

    def finish(self) -> None:
        """Wait for the save that is under way, if there is one.

        Raises:
            UserError: on every rank, if it failed on any.
        """
        under_way, self._under_way = self._under_way, None
        if under_way is not None:
            under_way.result()

    def end_exports(self, at_once: bool) -> None:
        """Wait for exports that are under way; a collective.

        Args:
            at_once: cut them off in place of that; the run makes them when it goes on.
        """
        if self._config.checkpoint.export_hf == "none":
            return
        if self._exporter is not None:
            self._exporter.cut_off() if at_once else self._exporter.finish()
        together(lambda: None)

    def news(self) -> list[str]:
        """What has come of exports since the last call, a line for each."""
        return [] if self._exporter is None else list(self._exporter.news())

    def _new_exporter(self) -> Exporter | None:
        """The one that the first rank has; none on the others."""
        config = self._config
        if dist.is_initialized() and dist.get_rank() > 0:
            return None
        return Exporter(config.checkpoint.export_hf, self._tokenizer, config.model.max_position_embeddings)

    def _layout(self) -> dict[str, int | str]:
        mesh, config = self._mesh, self._config
        sizes = {axis: getattr(mesh, axis).size for axis in AXES}
        sizes = {axis: sizes[axis] for axis in spoken_axes(sizes)}
        return sizes | {"zero_stage": config.parallel.zero_stage, "precision": config.training.precision}

    def _take_share(self, tensors: Iterable[StateTensor]) -> _Share:
        """Pick this rank's share of the tensors of its pipeline stage, and copy it to the host, if it is not there.

        What is given may be training's own memory, so that the thread needs a copy in any case. It goes where that of
        the save before was, because new memory costs many times as long as the copy itself.
        """
        copies, tensor = self._mesh.copies, self._mesh.tensor
        own = copies.rank * tensor.size + tensor.rank
        share = _Share()
        for writer, item in shared_out(tensors, lambda item: item.tensor.nbytes, copies.size * tensor.size):
            key, whole = f"{item.kind}/{item.name}", item.tensor
            if own == 0:
                share.stage.append(key)
            if writer == own:
                copied = self._thread is not None or whole.is_cuda
                share.tensors[key] = _to_host(whole, self._copy.tensors.get(key)) if copied else whole
        if self._mesh.device.type == "cuda":
            torch.cuda.synchronize()  # copies from its memory may be under way
        return share

    def _write_behind(self, share: _Share, manifest: Manifest, final: Path, begun: float) -> None:
        """Write in the thread, and say at once what training hears of only at its end."""
        try:
            self._write(share, manifest, final, begun)
        except Exception as error:
            if dist.get_rank() == 0 or not getattr(error, "shared", False):
                logger.warning("%s could not be saved; training goes on: %s", final, error)
            raise

    def _write(self, share: _Share, manifest: Manifest, final: Path, begun: float) -> None:
        self._remove_partial()
        try:
            self._write_together(share, manifest, partial_folder(final), final)
        except UserError:
            self._remove_partial()  # the disk may be full
            raise
        self.seconds = max(self.seconds or 0.0, time.monotonic() - begun)

    def _remove_partial(self) -> None:
        """Remove what a failed save, or a run that was killed while it saved, has left."""
        if dist.get_rank() == 0:
            for folder in partial_folders_in(self.folder):
                shutil.rmtree(folder, ignore_errors=True)

    def _write_together(self, share: _Share, manifest: Manifest, aside: Path, final: Path) -> None:
        rank, world = dist.get_rank(), dist.get_world_size()
        together(lambda: aside.mkdir(parents=True) if rank == 0 else None, self._group)
        file = f"tensors-{rank:05d}-of-{world:05d}.safetensors"
        entry = together(lambda: write_tensors(aside, file, share.tensors), self._group)
        parts: list = [None] * world
        dist.all_gather_object(parts, (file, entry, list(share.tensors), share.stage), group=self._group)
        tensors = {key: name for name, _, keys, _ in parts for key in keys}
        held = sorted(key for *_, stage in parts for key in stage)
        written = sorted(key for *_, keys, _ in parts for key in keys)
        assert held == written, "every tensor of every stage is written once"
        files = {name: entry for name, entry, *_ in parts}

        def describe() -> None:
            write_description(aside, replace(manifest, tensors=tensors, files=files), self._config, self._tokenizer)
            if self._exporter is not None:
                note_export(aside)
                self._exporter.finish()  # before what it reads is replaced or removed
            publish(aside, final)
            point_latest(self.folder, final.name)
            retain(self.folder, self._config.checkpoint.keep, self._config.checkpoint.keep_every)
            if self._exporter is not None:
                self._exporter.begin(final)

        together(lambda: describe() if rank == 0 else None, self._group)
