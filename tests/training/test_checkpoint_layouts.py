"""Ranks of every pipeline stage share the writing, at once or beside training, and a checkpoint is whole or not there.

The engines are stand-ins, so that nothing of DeepSpeed is waited for; `test_checkpoint.py` saves from real ones.
"""

import errno
import os
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron_ponder.base.errors import UserError
from megatron_ponder.checkpoint import tensor_files
from megatron_ponder.checkpoint.folders import CONFIG, MANIFEST, checkpoints_in, resolve_checkpoint
from megatron_ponder.checkpoint.manifest import read_manifest
from megatron_ponder.checkpoint.optimizer_state import ADAMW, WEIGHT
from megatron_ponder.checkpoint.reader import open_tensors
from megatron_ponder.checkpoint.run_state import RunState
from megatron_ponder.config import Config
from megatron_ponder.parallel.mesh import Mesh
from megatron_ponder.training import checkpointer as saving
from megatron_ponder.training.checkpointer import Checkpointer
from megatron_ponder.training.resuming import verify_together
from megatron_ponder.training.shares import shared_out
from megatron_ponder.training.state import StateTensor
from tests import REPOSITORY
from tests.distributed import run_distributed
from tests.finished_runs import alone, contents
from tests.models import small_config

BLOCK = {str(width): (32, width) for width in (8, 9, 10, 11, 12)}
SHAPES = (  # of each pipeline stage
    {"embedding.weight": (61, 32)} | {f"transformer.blocks.0.{name}": shape for name, shape in BLOCK.items()},
    {f"transformer.blocks.1.{name}": shape for name, shape in BLOCK.items()} | {"transformer.norm.weight": (32,)},
)
ONE, TWO = "step-00000001", "step-00000002"


class StandIn:
    """The state of one pipeline stage, alike on all of its ranks, which training changes in place."""

    def __init__(self, stage: int) -> None:
        generator = torch.Generator().manual_seed(stage)
        self.tensors = {
            (kind, name): torch.randn(shape, generator=generator)
            for name, shape in SHAPES[stage].items()
            for kind in (WEIGHT, *ADAMW)
        }

    def state(self) -> Iterator[StateTensor]:
        """As an engine has it."""
        for (kind, name), tensor in self.tensors.items():
            yield StateTensor(kind, name, tensor)

    def train(self) -> None:
        """Change every value."""
        for tensor in self.tensors.values():
            tensor.add_(1.0)


class Gate:
    """Holds back the writing of tensors on this rank until it is opened, and then lets it succeed or fail."""

    def __init__(self, broken: bool = False) -> None:
        self._opened, self._write, self._broken = threading.Event(), saving.write_tensors, broken

    def __enter__(self) -> "Gate":
        def write(*arguments) -> tuple[int, str]:
            assert self._opened.wait(60)
            if self._broken:
                raise OSError(errno.ENOSPC, "No space left on device", "tensors.safetensors")
            return self._write(*arguments)

        saving.write_tensors = write
        return self

    def __exit__(self, *_) -> None:
        self.open()
        saving.write_tensors = self._write

    def open(self) -> None:
        """Let writing go on."""
        self._opened.set()


def config_for(run_dir: Path, asynchronous: bool) -> Config:
    """A configuration for saving into a run folder."""
    return small_config(training__run_dir=run_dir, checkpoint__asynchronous=str(asynchronous).lower())


def file_of(rank: int, ranks: int) -> str:
    """Name of the file that a rank writes."""
    return f"tensors-{rank:05d}-of-{ranks:05d}.safetensors"


def listing(folder: Path) -> list[str]:
    """What is in a folder of checkpoints, without the files of each."""
    return sorted(path.name for path in folder.iterdir())


def save_beside_training(mesh: Mesh, run: Path) -> dict:
    """Save the same state into `sync` and into `async`, where training goes on before a byte is written."""
    engine = StandIn(mesh.pipeline.rank)
    with Checkpointer(config_for(run / "sync", False), None, ("d", "t"), mesh) as checkpointer:
        checkpointer.save(engine.state(), RunState(1, 8))
    with Checkpointer(config_for(run / "async", True), None, ("d", "t"), mesh) as checkpointer, Gate() as gate:
        final = checkpointer.save(engine.state(), RunState(1, 8))
        engine.train()
        total = torch.tensor(float(dist.get_rank()))
        dist.all_reduce(total)
        existed = final.exists()
        dist.barrier()
        threading.Timer(0.2 * dist.get_rank(), gate.open).start()
        checkpointer.save(engine.state(), RunState(2, 16))  # into the memory that holds the first
        complete = (final / MANIFEST).exists()
        engine.train()
    return {"total": float(total), "existed": existed, "complete": complete}


def fail_beside_training(mesh: Mesh, run: Path) -> list[tuple[str, list[str], list[str]]]:
    """Saves that succeed and fail in turn: what was raised on this rank, what is there, what was warned of so far."""
    engine = StandIn(mesh.pipeline.rank)
    checkpointer = Checkpointer(config_for(run, True), None, (None, None), mesh)
    warnings: list[str] = []
    saving.logger.addFilter(lambda record: warnings.append(record.getMessage()))
    seen = []

    def attempt(action: Callable[[], object]) -> None:
        try:
            action()
            message = ""
        except UserError as error:
            message = f"{error}{'' if error.shared else ', on this rank'}"
        dist.barrier()
        seen.append((message, listing(checkpointer.folder), list(warnings)))
        dist.barrier()

    def save_and_finish(step: int) -> None:
        checkpointer.save(engine.state(), RunState(step, step))
        checkpointer.finish()

    attempt(lambda: save_and_finish(1))
    with Gate(broken=dist.get_rank() == 1) as gate:
        gate.open()
        attempt(lambda: save_and_finish(2))
        checkpointer.save(engine.state(), RunState(3, 3))
        attempt(lambda: save_and_finish(4))  # in spite of the failure of the one before
    attempt(lambda: save_and_finish(5))
    return seen


def verify_in_shares(checkpoint: Path, name: str) -> tuple[list[str], str]:
    """The files that this rank reads to verify a checkpoint, and what is said when one of them is damaged."""
    read: list[str] = []
    digest = tensor_files.sha256
    tensor_files.sha256 = lambda path, *rest: read.append(path.name) or digest(path, *rest)
    try:
        verify_together(checkpoint)
        first = list(read)
        dist.barrier()
        if dist.get_rank() == 0:
            content = bytearray((checkpoint / name).read_bytes())
            content[-1] ^= 1
            (checkpoint / name).write_bytes(content)
        dist.barrier()
        with pytest.raises(UserError) as caught:
            verify_together(checkpoint)
    finally:
        tensor_files.sha256 = digest
    return first, str(caught.value)


def on_ranks(mesh: Mesh, folder: Path) -> dict:
    """Everything that needs several ranks."""
    seen = save_beside_training(mesh, folder)
    seen["failures"] = fail_beside_training(mesh, folder / "failing")
    damaged = folder / "failing" / "checkpoints" / "step-00000005"
    seen["read"], seen["damage"] = verify_in_shares(damaged, file_of(1, dist.get_world_size()))
    return seen


@pytest.fixture(scope="module", params=[1, pytest.param(2, marks=pytest.mark.slow)], ids=["data2", "pipeline2-data2"])
def layout(request, tmp_path_factory) -> tuple[list[dict], Path, int]:
    """What each of two data ranks of every stage saw, where, and the number of stages."""
    folder = tmp_path_factory.mktemp("ranks")
    return run_distributed(on_ranks, 2 * request.param, folder, pipeline=request.param), folder, request.param


def test_shares_are_even_and_follow_from_the_sizes_alone():
    sizes = [50, *([4, 1, 7, 2] * 9), 40]
    for ranks in (1, 2, 3, 5):
        owners = list(shared_out(enumerate(sizes), lambda item: item[1], ranks))
        assert [item for _, item in owners] == list(enumerate(sizes))
        loads = Counter()
        for rank, (_, size) in owners:
            loads[rank] += size
        assert set(loads) == set(range(ranks))
        assert max(loads.values()) <= sum(sizes) / ranks + max(sizes)
    assert [rank for rank, _ in shared_out([1, 1, 1, 9, 1, 1], int, 2)] == [0, 1, 0, 1, 0, 0]


def test_every_stage_is_shared_by_its_own_ranks(layout):
    _, folder, stages = layout
    checkpoint = folder / "sync" / "checkpoints" / ONE
    manifest = read_manifest(checkpoint)
    assert manifest.layout == {"tensor": 1, "pipeline": stages, "data": 2, "zero_stage": 1, "precision": "bf16"}
    assert (manifest.state.step, manifest.state.samples, manifest.data_fingerprint) == (1, 8, "d")
    with open_tensors(checkpoint) as tensors:
        for stage in range(stages):  # pipeline ranks are farthest apart
            files = [file_of(2 * stage + rank, 2 * stages) for rank in range(2)]
            engine = StandIn(stage)
            for (kind, name), expected in engine.tensors.items():
                assert torch.equal(tensors.get(kind, name), expected)
                assert manifest.tensors.pop(f"{kind}/{name}") in files
            sizes = [manifest.files[file][0] for file in files]
            assert abs(sizes[0] - sizes[1]) < max(tensor.nbytes for tensor in engine.tensors.values())
    assert not manifest.tensors


def test_saving_beside_training_writes_what_was_there_when_it_was_asked(layout):
    ranks, folder, stages = layout
    for seen in ranks:
        assert seen["total"] == sum(range(2 * stages))
        assert not seen["existed"]  # training went on before
        assert seen["complete"]  # the second save waited for the first
    want = contents(folder / "sync" / "checkpoints" / ONE)
    got = contents(folder / "async" / "checkpoints" / ONE)
    for name in (MANIFEST, CONFIG):  # the configurations differ in their run folders
        assert want.pop(name) != got.pop(name)
    assert len(got) == 2 * stages
    assert got == want
    with open_tensors(folder / "async" / "checkpoints" / TWO) as tensors:
        for stage in range(stages):
            for (kind, name), before in StandIn(stage).tensors.items():
                assert torch.equal(tensors.get(kind, name), before + 1)
    assert listing(folder / "async" / "checkpoints") == ["latest", ONE, TWO]


def test_a_failure_beside_training_is_raised_on_every_rank_and_leaves_the_last_checkpoint(layout):
    ranks, folder, _ = layout
    full = "No space left on device (tensors.safetensors); free some space or choose another folder"
    final = folder / "failing" / "checkpoints"
    warned = [
        f"{final / name} could not be saved; training goes on: {full}"
        for name in (TWO, "step-00000003", "step-00000004")
    ]
    for rank, seen in enumerate(ranks):
        messages, listings, warnings = zip(*seen["failures"], strict=True)
        assert messages == ("", full, full, "")
        assert listings == (["latest", ONE],) * 3 + (["latest", ONE, "step-00000005"],)
        assert warnings == (([], warned[:1], warned, warned) if rank == 0 else ([],) * 4)


def test_a_job_verifies_each_file_once(layout):
    ranks, folder, stages = layout
    read = Counter(name for seen in ranks for name in seen["read"])
    manifest = read_manifest(folder / "failing" / "checkpoints" / "step-00000005")
    assert read == Counter(list(manifest.files))
    assert all(len(seen["read"]) >= 1 for seen in ranks)
    assert len({seen["damage"] for seen in ranks}) == 1
    assert f"{file_of(1, 2 * stages)} is damaged (its checksum differs)" in ranks[0]["damage"]


def test_an_exception_in_training_does_not_lose_the_save_under_way(tmp_path):
    def train() -> None:
        with Checkpointer(config_for(tmp_path, True), None, (None, None), Mesh()) as checkpointer, Gate() as gate:
            checkpointer.save(StandIn(0).state(), RunState(1, 8))
            threading.Timer(0.3, gate.open).start()
            raise ZeroDivisionError

    with alone():
        gate = saving.write_tensors
        with pytest.raises(ZeroDivisionError):
            train()
        assert saving.write_tensors is gate
    with open_tensors(resolve_checkpoint(tmp_path)) as tensors:
        assert len(tensors.manifest.tensors) == len(StandIn(0).tensors)


KILLED = """
import os, sys, time, torch
from pathlib import Path
from megatron_ponder.checkpoint.run_state import RunState
from megatron_ponder.parallel.mesh import Mesh
from megatron_ponder.training import checkpointer as saving
from tests.finished_runs import alone
from tests.training.test_checkpoint_layouts import StandIn, config_for

def say(line):
    os.write(1, line)  # whole: print writes a line and its end apart, and two threads speak here

def stall(folder, name, tensors):
    (folder / name).write_bytes(b"half")
    say(b"writing\\n")
    time.sleep(100)

with alone():
    with saving.Checkpointer(config_for(Path(sys.argv[1]), True), None, (None, None), Mesh()) as checkpointer:
        checkpointer.save(StandIn(0).state(), RunState(1, 8))
        checkpointer.finish()
        saving.write_tensors = stall
        checkpointer.save(StandIn(0).state(), RunState(2, 16))
        say(b"training\\n")
        checkpointer.finish()
"""


def test_a_kill_while_saving_beside_training_leaves_the_last_checkpoint(tmp_path):
    environ = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-c", KILLED, str(tmp_path)]
    with subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, text=True) as process:
        assert {process.stdout.readline(), process.stdout.readline()} == {"writing\n", "training\n"}
        process.send_signal(signal.SIGKILL)
    folder = tmp_path / "checkpoints"
    assert listing(folder) == [f".{TWO}.partial", "latest", ONE]
    assert (folder / "latest").read_text() == f"{ONE}\n"
    with open_tensors(resolve_checkpoint(tmp_path)) as tensors:
        assert tensors.manifest.state.step == 1
    with alone(), Checkpointer(config_for(tmp_path, True), None, (None, None), Mesh()) as checkpointer:
        checkpointer.save(StandIn(0).state(), RunState(3, 24))
    assert listing(folder) == ["latest", ONE, "step-00000003"]
    assert checkpoints_in(folder)[-1] == resolve_checkpoint(tmp_path)
