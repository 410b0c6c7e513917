"""What goes wrong on one rank in the middle of a run: all ranks know, nothing is lost, one line says what it was."""

import errno
import io
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron_ponder.base.errors import Preempted, UserError
from megatron_ponder.checkpoint.folders import MANIFEST, latest_checkpoint, resolve_checkpoint
from megatron_ponder.checkpoint.manifest import read_manifest
from megatron_ponder.config import Config, read_config
from megatron_ponder.data import dataset_manifest, indexed_dataset
from megatron_ponder.data.mixture import open_mixture
from megatron_ponder.model import ends
from megatron_ponder.parallel.mesh import Mesh
from megatron_ponder.runs.metrics import read_metrics
from megatron_ponder.runs.run_folder import RunFolder
from megatron_ponder.training import checkpointer as saving
from megatron_ponder.training import trainer
from megatron_ponder.training.loss_spikes import LossSpikes
from megatron_ponder.training.trainer import train
from tests.distributed import run_distributed
from tests.finished_runs import alone, tiny_arguments, undrawn
from tests.training.test_preemption import AfterLooks
from tests.training.test_resume import essentials, final_state
from tests.training.test_skipped_steps import faulty

MODES = {"adaptive": {}, "pruned": {"ponder_training__prune_start": 0}, "fixed": {"ponder__mode": "fixed"}}
# Everything is measured that a run can measure, at every step.
NOT_FINITE = {
    "training__eval_interval": 1,
    "logging__own_losses_interval": 1,
    "logging__tensorboard": "true",
    "training__skipped_steps_budget": 2,
}
FAST = NOT_FINITE | {"optimizer__learning_rate": 1e19, "optimizer__warmup_fraction": 0}
FULL = "No space left on device (tensors.safetensors); free some space or choose another folder"


@dataclass
class Attempt:
    """How a start went on one rank: what ended it, and what was printed."""

    end: str
    printed: str


def attempt(mesh: Mesh, arguments: list[str], signals=None, drawn: bool = False) -> Attempt:
    printed, end = io.StringIO(), "finished"
    with redirect_stdout(printed), nullcontext() if drawn else undrawn():
        try:
            train(read_config(arguments), mesh.device, signals)
        except (UserError, Preempted) as error:
            end = f"{type(error).__name__}: {error}"
    dist.barrier()
    return Attempt(end, printed.getvalue())


class Patched:
    """A function of a module in place of another, on the second rank alone, which counts its calls."""

    def __init__(self, module, name: str, function: Callable) -> None:
        self._module, self._name, self._function = module, name, function
        self._whole, self.calls = getattr(module, name), 0

    def __enter__(self) -> None:
        if dist.get_rank() == 1:
            setattr(self._module, self._name, self._call)

    def __exit__(self, *_) -> None:
        setattr(self._module, self._name, self._whole)

    def _call(self, *args, **kwargs):
        self.calls += 1
        return self._function(self.calls, self._whole, *args, **kwargs)


def bad_gradients(*steps: int) -> Patched:
    """In these steps, of one micro-batch each, of which the engine takes one more when it is made."""
    return Patched(
        ends,
        "vocab_parallel_cross_entropy",
        lambda call, whole, *args, **kwargs: (faulty("gradient") if call - 1 in steps else whole)(*args, **kwargs),
    )


@contextmanager
def nan_weight() -> Iterator[None]:
    """One of the weights that training starts from is no number, on every rank."""
    build = trainer.build_model

    def spoilt(*args):
        model = build(*args)
        with torch.no_grad():
            model.embedding.weight[:, 3] = math.nan
        return model

    trainer.build_model = spoilt
    try:
        yield
    finally:
        trainer.build_model = build


def disk_full(*saves: int) -> Patched:
    def write(call, whole, *args):
        if call in saves:
            raise OSError(errno.ENOSPC, "No space left on device", "tensors.safetensors")
        return whole(*args)

    return Patched(saving, "write_tensors", write)


def unreadable(first: int) -> Patched:
    def pread(call, whole, *args):
        if call >= first:
            raise OSError(errno.EIO, "Input/output error")
        return whole(*args)

    return Patched(indexed_dataset.os, "pread", pread)


def overwritten(first: int, path: Path) -> Patched:
    """Somebody writes to the tokens while they are read, even if only what was there."""

    def pread(call, whole, *args):
        if call == first:
            with open(path, "rb+") as file:
                token = file.read(2)
                file.seek(0)
                file.write(token)
        return whole(*args)

    return Patched(indexed_dataset.os, "pread", pread)


def write_unknown_id(config: Config, sample: int) -> None:
    """An id that the model does not know, in one of the samples that a run trains on."""
    dataset = open_mixture(config.data, config.training.seed).samples["train"]
    piece = dataset.index.locate(sample)[0]
    with open(f"{config.data.path}.bin", "rb+") as file:
        file.seek(2 * (dataset.indexed.span(dataset.documents[piece.document])[0] + piece.offset + 1))
        file.write(b"\xff\xff")


def copied(dataset: Path, folder: Path) -> Path:
    """A dataset whose manifest, as those of earlier versions, has no checksums of its files."""
    folder.mkdir()
    for ending in (".bin", ".idx"):
        shutil.copyfile(f"{dataset}{ending}", folder / f"data{ending}")
        os.utime(folder / f"data{ending}", (1e9, 1e9))
    without = replace(dataset_manifest.read_dataset_manifest(dataset), bin_sha256="", fingerprint="")
    dataset_manifest.write_dataset_manifest(folder / "data", without)
    return folder / "data"


def everything(mesh: Mesh, folder: Path, commands: dict[str, list[str]]) -> dict[str, Attempt]:
    """All faults, one after another, because a start of ranks takes longer than the rest."""
    seen = {}
    with bad_gradients(3):
        seen["skipped"] = attempt(mesh, commands["skipped"], drawn=True)
    with bad_gradients(3):
        seen["stopped"] = attempt(mesh, commands["resumed"], AfterLooks(4))
    seen["resumed"] = attempt(mesh, commands["resumed"])
    with bad_gradients(2, 3, 4):
        seen["too many"] = attempt(mesh, commands["too many"])
    for name in MODES:
        seen[f"fast {name}"] = attempt(mesh, commands[f"fast {name}"])
    with nan_weight():
        seen["nan weight"] = attempt(mesh, commands["nan weight"])
    with disk_full(1):
        seen["disk full"] = attempt(mesh, commands["disk full"])
    with disk_full(2):
        seen["disk full at the end"] = attempt(mesh, commands["disk full at the end"])
    with unreadable(4):
        seen["unreadable"] = attempt(mesh, commands["unreadable"])
    with overwritten(4, folder / "copy" / "data.bin"):
        seen["overwritten"] = attempt(mesh, commands["overwritten"])
    if mesh.data.rank == 0:
        write_unknown_id(read_config(commands["unknown ids"]), sample=18)
    dist.barrier()
    seen["unknown ids"] = attempt(mesh, commands["unknown ids"])
    with RunFolder(folder / "other", "") if mesh.data.rank == 0 else nullcontext():
        seen["held"] = attempt(mesh, commands["other"])
    other = ["--training.seed=7"] if mesh.data.rank == 1 else []
    seen["another configuration"] = attempt(mesh, [*commands["other"], *other])

    seen["before damage"] = attempt(mesh, commands["damaged"])
    latest = resolve_checkpoint(folder / "damaged")
    if mesh.data.rank == 0:
        (folder / "names").write_text(latest.name)
        shard = max(latest.glob("tensors-*"), key=lambda path: path.name)
        os.truncate(shard, shard.stat().st_size // 2)
    dist.barrier()
    seen["damaged"] = attempt(mesh, commands["damaged"])
    if mesh.data.rank == 0:
        for path in (folder / "damaged" / "checkpoints").glob(f"*/{MANIFEST}"):
            os.truncate(path, 10)
    dist.barrier()
    seen["all damaged"] = attempt(mesh, commands["damaged"])
    return seen


@pytest.fixture(scope="module")
def ranks(corpus, tmp_path_factory) -> tuple[list[dict[str, Attempt]], Path]:
    folder = tmp_path_factory.mktemp("faults")
    copy = copied(corpus.dataset, folder / "copy")

    def command(name: str, **settings) -> list[str]:
        # what each step predicts is not measured, because faults are counted by calls of the loss
        base = {"training__eval_interval": 0, "checkpoint__resume": "auto", "logging__own_losses_interval": 0}
        return tiny_arguments(corpus, folder / name, **(base | settings))

    commands = {
        "skipped": command("skipped"),
        "resumed": command("resumed"),
        "too many": command("too many", training__skipped_steps_budget=2),
        "disk full": command("disk full"),
        "nan weight": command("nan weight", **NOT_FINITE),
        **{f"fast {name}": command(f"fast {name}", **FAST, **mode) for name, mode in MODES.items()},
        "disk full at the end": command("disk full at the end"),
        "unreadable": command("unreadable"),
        "overwritten": command("overwritten", data__path=copy),
        "unknown ids": command("unknown ids", data__path=copy),
        "other": command("other"),
        "damaged": command("damaged"),
    }
    return run_distributed(everything, 2, folder, commands, time_limit=400), folder


def alike(ranks, name: str) -> Attempt:
    """How it went, which both ranks must agree on; only the first prints."""
    first, second = (seen[name] for seen in ranks[0])
    assert first.end == second.end
    assert second.printed == ""
    return first


def test_a_bad_gradient_is_skipped_and_logged_and_the_run_resumes_bit_for_bit(ranks):
    folder = ranks[1]
    assert alike(ranks, "skipped").end == "finished"
    line = "step 3  warning: skipped, its gradients not finite (samples 8 to 11)"
    assert line in alike(ranks, "skipped").printed
    records = read_metrics(folder / "skipped")
    assert [record.get("skipped", False) for record in records] == [step == 3 for step in range(1, 9)]
    assert records[2]["grad_norm"] is None
    assert records[2]["loss"] > 0
    assert [record["samples"] for record in records] == [4 * step for step in range(1, 9)]
    assert alike(ranks, "stopped").end.startswith("Preempted: stopped at step 5")
    assert "going on after step 5" in alike(ranks, "resumed").printed
    assert read_manifest(resolve_checkpoint(folder / "resumed")).state.skipped == [3]
    assert essentials(folder / "resumed") == essentials(folder / "skipped")
    want, got = final_state(folder / "skipped"), final_state(folder / "resumed")
    assert all(torch.equal(got[key], tensor) for key, tensor in want.items())
    assert (folder / "skipped" / "training.png").is_file()


def test_too_many_skipped_steps_end_the_run_with_its_last_good_state(ranks):
    run = ranks[1] / "too many"
    end = alike(ranks, "too many").end
    assert end.startswith("UserError: 3 of the last 4 steps were skipped, because their loss or gradients")
    assert end.endswith(f"saved {run}/checkpoints/step-00000004")
    manifest = read_manifest(resolve_checkpoint(run))
    assert (manifest.state.step, manifest.state.samples, manifest.state.skipped) == (4, 16, [2, 3, 4])
    assert all(tensor.isfinite().all() for tensor in final_state(run).values())


@pytest.mark.parametrize("name", [*(f"fast {name}" for name in MODES), "nan weight"])
def test_a_model_that_has_become_nonsense_skips_its_steps_and_ends_in_one_line(ranks, name):
    seen, run = alike(ranks, name), ranks[1] / name
    check_nonsense(seen, run)


@pytest.mark.parametrize("name", MODES)
def test_the_same_on_one_rank(corpus, tmp_path, name):
    arguments = tiny_arguments(corpus, tmp_path / "run", **FAST, **MODES[name])
    with alone() as device:
        seen = attempt(Mesh(device=device), arguments)
    check_nonsense(seen, tmp_path / "run")


def check_nonsense(seen: Attempt, run: Path) -> None:
    """Of a run whose weights are good for nothing from some step on."""
    assert re.match(r"UserError: 3 of the last \d steps were skipped, because their loss or gradients", seen.end)
    records = read_metrics(run)
    assert sum(record.get("skipped", False) for record in records) == 3
    assert "warning: skipped, its loss not finite" in seen.printed
    assert "validation loss not finite" in seen.printed
    assert records[-1]["loss"] is records[-1]["validation_loss"] is None
    assert records[-1]["latent_step_histogram"][-1] <= sum(records[-1]["latent_step_histogram"])
    manifest = read_manifest(resolve_checkpoint(run))
    assert manifest.state.step == len(records) and len(manifest.state.skipped) == 3


def test_a_full_disk_costs_a_checkpoint_and_not_the_run(ranks):
    run = ranks[1] / "disk full"
    seen = alike(ranks, "disk full")
    assert seen.end == "finished"
    assert f"step 4  warning: not saved, training goes on: {FULL}" in seen.printed
    assert resolve_checkpoint(run).name == "step-00000008"


def test_a_run_whose_last_save_failed_ends_with_an_error(ranks):
    run = ranks[1] / "disk full at the end"
    seen = alike(ranks, "disk full at the end")
    assert seen.end == f"UserError: {FULL}"
    assert "step 4  saved" in seen.printed
    assert latest_checkpoint(run / "checkpoints").name == "step-00000004"
    assert final_state(run)
    assert read_metrics(run)[-1]["step"] == 8


def test_data_that_cannot_be_read_end_all_ranks_with_one_line_and_a_checkpoint(ranks):
    run = ranks[1] / "unreadable"
    end = alike(ranks, "unreadable").end
    assert end.startswith("UserError: ")
    assert end.endswith(": Input/output error; check its disk")
    assert ".bin cannot be read at byte" in end
    manifest, records = read_manifest(resolve_checkpoint(run)), read_metrics(run)
    assert manifest.state.step == records[-1]["step"] < 8
    assert manifest.state.samples == records[-1]["samples"]
    assert not any("skipped" in record for record in records)


def test_data_that_are_written_to_while_training_end_all_ranks_alike(ranks):
    run = ranks[1] / "overwritten"
    end = alike(ranks, "overwritten").end
    assert end == (
        f"UserError: {ranks[1]}/copy/data.bin has been written to since it was opened; put back what it was, or begin "
        "anew with what it is"
    )
    manifest, records = read_manifest(resolve_checkpoint(run)), read_metrics(run)
    assert 0 < manifest.state.step == records[-1]["step"] < 8


def test_ids_that_the_model_does_not_know_end_all_ranks_with_the_sample_and_a_checkpoint(ranks):
    run = ranks[1] / "unknown ids"
    end = alike(ranks, "unknown ids").end
    where = rf"document \d+( and \d+ more)? of {ranks[1]}/copy/data"
    assert re.match(rf"UserError: sample 18 \({where}\) has the token id 65535, and the model knows 0 to 511: the", end)
    manifest, records = read_manifest(resolve_checkpoint(run)), read_metrics(run)
    assert manifest.state.step == records[-1]["step"] == 4
    assert not any("skipped" in record for record in records)


def test_a_rank_with_another_configuration_is_refused_by_all(ranks):
    end = alike(ranks, "another configuration").end
    assert "training.seed is 1234 on rank 0 and 7 on rank 1; start all ranks with the same" in end
    assert not (ranks[1] / "other").exists()


def test_a_folder_that_another_run_holds_is_refused_by_all(ranks):
    assert f"UserError: the run folder {ranks[1]}/other is in use by process " in alike(ranks, "held").end


def test_a_damaged_latest_checkpoint_is_passed_over(ranks):
    run = ranks[1] / "damaged"
    seen = alike(ranks, "damaged")
    assert seen.end == "finished"
    assert "warning: " in seen.printed and "bytes where" in seen.printed and "it is passed over" in seen.printed
    assert "going on after step 4" in seen.printed
    assert [record["step"] for record in read_metrics(run)] == list(range(1, 9))
    end = alike(ranks, "all damaged").end
    assert end.startswith("UserError: nothing whole is left of 2 checkpoints in ")
    assert "choose another --training.run_dir to start anew" in end


def test_spikes_are_judged_by_the_losses_before():
    spikes = LossSpikes(6.0, [])
    assert all(spikes.score(5.0 + 0.01 * (step % 7)) is None for step in range(30))
    assert spikes.score(5.08) is None
    assert spikes.score(9.0) > 6
    assert spikes.score(9.0) > 6, "one spike does not hide the next"
    assert spikes.score(1.0) is None
    assert spikes.score(float("nan")) is None
    assert LossSpikes(6.0, [5.0] * 19).score(100.0) is None
    assert LossSpikes(6.0, [5.0] * 20 + [None]).score(100.0) > 6
    assert LossSpikes(0.0, [5.0] * 20).score(100.0) is None
