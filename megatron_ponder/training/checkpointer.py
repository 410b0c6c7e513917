"""Saving the state of a run, all ranks together, and finding the state to go on from."""

import logging
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_ponder.base.errors import UserError
from megatron_ponder.checkpoint.completeness import check_state
from megatron_ponder.checkpoint.manifest import (
    Manifest,
    checkpoint_name,
    checkpoints_in,
    latest_checkpoint,
    latest_problem,
    read_manifest,
)
from megatron_ponder.checkpoint.store import (
    partial_folder,
    partial_folders_in,
    point_latest,
    publish,
    resolve_checkpoint,
    retain,
    verify,
    write_description,
)
from megatron_ponder.checkpoint.tensor_files import write_tensors
from megatron_ponder.config import Config
from megatron_ponder.data.mixture import same_past
from megatron_ponder.parallel.collectives import together
from megatron_ponder.parallel.mesh import Mesh
from megatron_ponder.training.deepspeed_engine import Engine
from megatron_ponder.training.penalty import UNSTEERED, PenaltyState

Item = TypeVar("Item")
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Share:
    """What one rank writes.

    Attributes:
        tensors: by `kind/parameter name`.
        stage: keys of all tensors of its pipeline stage, on the first rank of the stage; else none.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    stage: list[str] = field(default_factory=list)


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
            self._group = dist.new_group(backend="gloo")
            self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._under_way: Future | None = None
        self._copy = _Share()
        self.seconds: float | None = None

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, exception_type, exception, traceback) -> None:
        if self._thread is not None:
            self._thread.shutdown()  # waits: the checkpoint is worth having, whatever has ended the training
        if exception is None:
            self.finish()  # else a failure of the save would hide the reason

    def save(
        self,
        engine: Engine,
        step: int,
        samples: int,
        validated: bool = True,
        skipped: Sequence[int] = (),
        penalty: PenaltyState = UNSTEERED,
    ) -> Path:
        """Write the checkpoint after `step` steps, or begin to; a collective.

        An asynchronous save returns when the state has been copied, and training may change it.

        Args:
            engine: whose state to save.
            step: steps done.
            samples: consumed.
            validated: false if the validation that was due after this step has been cut off.
            skipped: steps among them that changed nothing.
            penalty: of `Penalty`.

        Returns:
            The checkpoint's folder, which an asynchronous save has yet to make.

        Raises:
            UserError: on every rank, if any rank could not write its part. That an asynchronous save has failed is told
                at once on rank 0, and raised by `finish` if no other has been begun since.
        """
        with suppress(UserError):
            self.finish()
        final = self.folder / checkpoint_name(step)
        manifest = Manifest(
            step,
            samples,
            *self._fingerprints,
            skipped=list(skipped),
            validated=validated,
            penalty_factor=penalty.factor,
            penalty_steps=penalty.mean_steps,
            layout=self._layout(),
        )
        begun = time.monotonic()
        share = self._take_share(engine)
        if self._thread is None:
            self._write(share, manifest, final, begun)
        else:
            self._copy = share
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

    def _layout(self) -> dict[str, int | str]:
        mesh, config = self._mesh, self._config
        sizes = {name: getattr(mesh, name).size for name in ("tensor", "pipeline", "data")}
        return sizes | {"zero_stage": config.parallel.zero_stage, "precision": config.training.precision}

    def _take_share(self, engine: Engine) -> _Share:
        """This rank's share of what its pipeline stage holds.

        What the engine gives may be training's own memory, so that the thread needs a copy. It goes where that of the
        save before was, because new memory costs many times as long as the copy itself.
        """
        data, tensor = self._mesh.data, self._mesh.tensor
        own = data.rank * tensor.size + tensor.rank
        share = _Share()
        for writer, item in shared_out(engine.state(), lambda item: item.tensor.nbytes, data.size * tensor.size):
            key, whole = f"{item.kind}/{item.name}", item.tensor
            if own == 0:
                share.stage.append(key)
            if writer == own:
                if self._thread is not None:
                    before = self._copy.tensors.get(key)
                    whole = (torch.empty(whole.shape) if before is None else before).copy_(whole)
                share.tensors[key] = whole
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
            publish(aside, final)
            point_latest(self.folder, final.name)
            retain(self.folder, self._config.checkpoint.keep)

        together(lambda: describe() if rank == 0 else None, self._group)


def shared_out(items: Iterable[Item], size: Callable[[Item], int], ranks: int) -> Iterator[tuple[int, Item]]:
    """Share items out between ranks, each to the one that has the fewest bytes; alike on all that see the same sizes.

    No rank gets more than an even share and the largest item.

    Args:
        items: in an order that all ranks share.
        size: of an item in bytes.
        ranks: number of ranks.

    Returns:
        Each item with the rank that it belongs to.
    """
    loads = [0] * ranks
    for item in items:
        rank = loads.index(min(loads))
        loads[rank] += size(item)
        yield rank, item


def verify_together(folder: Path, resumable: bool = False) -> None:
    """Verify a checkpoint, each rank a share of its files, so that each is read once in the whole job; a collective.

    Args:
        folder: of the checkpoint.
        resumable: whether it must have the whole state of a run, all of it finite.

    Raises:
        UserError: on every rank, naming what is missing, damaged or not finite.
    """

    def verify_share() -> tuple[Manifest, dict[str, tuple[int, str]]]:
        manifest = read_manifest(folder)
        shares = shared_out(manifest.files.items(), lambda file: file[1][0], dist.get_world_size())
        own = dict(file for rank, file in shares if rank == dist.get_rank())
        verify(folder, replace(manifest, files=own))
        return manifest, own

    manifest, own = together(verify_share)
    if resumable:
        together(lambda: check_state(folder, manifest, own))


def find_resume(config: Config) -> tuple[Path | None, list[str]]:
    """The verified checkpoint folder to go on from; None to start anew; a collective.

    With `auto` it is the latest of the run folder, and where that is damaged the newest that is not.

    Returns:
        The folder, and what is wrong with each that has been passed over.

    Raises:
        UserError: on every rank, if the run folder has checkpoints that a new run would overwrite, there is none to
            resume, or none is whole.
    """
    resume = config.checkpoint.resume
    candidates, pointer = together(lambda: (_candidates(config), _pointer_problem(config)))
    damage: list[str] = []
    for folder in candidates:
        try:
            verify_together(folder, resumable=True)
            return folder, [*pointer, *damage]
        except UserError as error:
            if resume != "auto":
                raise
            damage.append(str(error))
    if damage:
        error = UserError(
            f"all {len(damage)} checkpoints in {candidates[0].parent} are damaged ({damage[0]}); resume from a copy "
            "with --checkpoint.resume FOLDER, or choose another --training.run_dir to start anew"
        )
        error.shared = True
        raise error
    return None, []


def _candidates(config: Config) -> list[Path]:
    """Checkpoint folders that the run may go on from, the best first; none to start anew."""
    resume, run_dir = config.checkpoint.resume, Path(config.training.run_dir)
    if resume not in ("auto", "none"):
        return [resolve_checkpoint(Path(resume))]
    latest = latest_checkpoint(run_dir / "checkpoints")
    if latest is None:
        return []
    if resume == "auto":
        others = [folder for folder in checkpoints_in(run_dir / "checkpoints") if folder != latest]
        return [latest, *reversed(others)]
    raise UserError(
        f"{run_dir} already holds checkpoints, the last one {latest.name}; add --checkpoint.resume auto to go on "
        "from it, or choose another --training.run_dir"
    )


def _pointer_problem(config: Config) -> list[str]:
    """What is wrong with `latest` of the run folder, where it is to say which checkpoint counts."""
    problem = latest_problem(Path(config.training.run_dir) / "checkpoints")
    return [problem] if problem is not None and config.checkpoint.resume == "auto" else []


def initial_weights(config: Config) -> Path | None:
    """The checkpoint whose weights a new run starts from; None for initial ones from the seed.

    Raises:
        UserError: if there is no such checkpoint.
    """
    source = config.checkpoint.initialize_from
    return None if source is None else resolve_checkpoint(Path(source))


def check_resumable(folder: Path, config: Config, data_fingerprint: str, tokenizer_fingerprint: str | None) -> Manifest:
    """The manifest of a checkpoint that this run can go on from.

    Raises:
        UserError: if it was made from other data or with another tokenizer, or is ahead of this run.
    """
    manifest = read_manifest(folder)
    stored = manifest.data_fingerprint
    same = stored is None or same_past(stored, data_fingerprint, manifest.samples)
    if not same and not config.checkpoint.allow_data_change:
        alone = isinstance(config.data.path, str) and not config.data.phases
        what = f"the dataset {config.data.path}" if alone else "a dataset, a weight, a phase that has begun"
        raise UserError(
            f"the data are not those that {folder} was trained on: {what}, data.split, "
            "data.sequence_length or training.seed has changed; put it back, or add "
            "--checkpoint.allow_data_change true to go on all the same"
        )
    known = manifest.tokenizer_fingerprint
    if known is not None and tokenizer_fingerprint is not None and known != tokenizer_fingerprint:
        raise UserError(
            f"the tokenizer {config.tokenizer.path} is not the one that {folder} was trained with; "
            "set tokenizer.path to the tokenizer of that run"
        )
    if manifest.step > config.training.steps:
        raise UserError(
            f"{folder} has done {manifest.step} steps already; set training.steps to more than that to go on"
        )
    return manifest
