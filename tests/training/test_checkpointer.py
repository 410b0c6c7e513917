"""Saving is all or nothing on all ranks; what is saved goes on, or starts anew, on any number of ranks."""

import errno
import threading
from pathlib import Path

import pytest
import torch

from megatron_ponder.base.errors import UserError
from megatron_ponder.checkpoint.folders import resolve_checkpoint
from megatron_ponder.checkpoint.load import load_model
from megatron_ponder.checkpoint.manifest import read_manifest
from megatron_ponder.checkpoint.reader import open_tensors
from megatron_ponder.checkpoint.run_state import RunState
from megatron_ponder.config import Config, read_config
from megatron_ponder.data.loader import validation_batches
from megatron_ponder.model.ponder import PonderLM
from megatron_ponder.model.tally import Tally
from megatron_ponder.parallel.mesh import Mesh
from megatron_ponder.parallel.sharding import initialize
from megatron_ponder.runs.metrics import of_steps, read_metrics
from megatron_ponder.runs.status import run_status
from megatron_ponder.training import checkpointer as saving
from megatron_ponder.training.checkpointer import Checkpointer
from megatron_ponder.training.deepspeed_engine import Engine
from megatron_ponder.training.objective import Objective
from megatron_ponder.training.resuming import find_resume
from megatron_ponder.training.schedules import refinements
from megatron_ponder.training.setup import open_parts
from megatron_ponder.training.state import state_of
from megatron_ponder.training.trainer import train
from tests.distributed import run_distributed
from tests.finished_runs import FinishedRuns, contents, finished_runs, tiny_arguments, train_in_turn
from tests.models import random_tokens, small_config


def engine_for(config: Config, mesh: Mesh) -> Engine:
    """One step old, so that there are moments to save."""
    model = PonderLM(config.model, config.ponder)
    initialize(model, seed=0)
    engine = Engine(Objective(model), config, mesh)
    train_one_step(engine, mesh)
    return engine


def train_one_step(engine: Engine, mesh: Mesh) -> None:
    """Change every weight and moment."""
    tokens = random_tokens(1, 9, seed=mesh.data.rank)
    engine.forward_backward([tokens], 1, engine.rule("soft"), 0.0, 1 / 8)
    engine.step(1e-3)


def listing(folder: Path) -> list[str]:
    """What is in a folder of checkpoints, without the files of each."""
    return sorted(path.name for path in folder.iterdir())


def disk_full(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device", "tensors.safetensors")


def config_for(mesh: Mesh, run_dir: Path, **overrides) -> Config:
    """One sequence of each rank a step."""
    return small_config(
        training__run_dir=run_dir,
        training__global_batch_size=mesh.data.size,
        training__micro_batch_size=1,
        training__precision="fp32",
        checkpoint__keep=2,
        **overrides,
    )


def save_with_failures(mesh: Mesh, run_dir: Path) -> list[tuple[str, list[str], str]]:
    """Saves that succeed and fail in turn: what was raised on this rank, what is there, and what `latest` names."""
    config = config_for(mesh, run_dir)
    engine = engine_for(config, mesh)
    checkpointer = Checkpointer(config, None, (None, None), mesh)
    seen = []

    def save(step: int, broken: str | None = None, rank: int = 0) -> None:
        whole = getattr(saving, broken) if broken else None
        if broken and mesh.data.rank == rank:
            setattr(saving, broken, disk_full)
        message = ""
        try:
            checkpointer.save(state_of(engine), RunState(step, step))
        except UserError as error:
            message = str(error)
        finally:
            if broken:
                setattr(saving, broken, whole)
        torch.distributed.barrier()
        folder = checkpointer.folder
        latest = (folder / "latest").read_text().strip() if (folder / "latest").exists() else ""
        seen.append((message, listing(folder), latest))
        torch.distributed.barrier()

    save(1)
    save(2, broken="write_tensors", rank=1)
    save(2, broken="write_description", rank=0)
    (checkpointer.folder / ".step-00000007.partial").mkdir(exist_ok=True)  # of a run that was killed while it saved
    torch.distributed.barrier()
    save(2)
    save(3)
    save(3, broken="publish", rank=0)
    return seen


def save_beside_training(mesh: Mesh, folder: Path) -> None:
    """Save the same state, at ZeRO stages that keep it in different ways, at once and while the next step is taken."""
    write = saving.write_tensors
    for stage in (0, 1, 3):
        config = config_for(mesh, folder / f"at-once-{stage}", parallel__zero_stage=stage)
        engine = engine_for(config, mesh)
        Checkpointer(config, None, (None, None), mesh).save(state_of(engine), RunState(1, 2))
        config = config_for(
            mesh, folder / f"beside-{stage}", parallel__zero_stage=stage, checkpoint__asynchronous="true"
        )
        stepped = threading.Event()
        saving.write_tensors = lambda *arguments, stepped=stepped: stepped.wait(60) and write(*arguments)
        with Checkpointer(config, None, (None, None), mesh) as checkpointer:
            checkpointer.save(state_of(engine), RunState(1, 2))
            train_one_step(engine, mesh)
            stepped.set()
        saving.write_tensors = write


def on_two_ranks(mesh: Mesh, folder: Path, command: list[str]) -> list[tuple[str, list[str], str]]:
    """Everything here that needs two ranks, whose start takes longer than the rest."""
    seen = save_with_failures(mesh, folder / "failures")
    save_beside_training(mesh, folder)
    train(read_config(command), mesh.device)
    return seen


@pytest.fixture(scope="module")
def runs(corpus) -> FinishedRuns:
    return finished_runs(corpus)


@pytest.fixture(scope="module")
def two_ranks(runs, corpus, tmp_path_factory) -> tuple[list, Path]:
    """What each rank saw of saves that failed, into `failures`; and in `halves` the last half of a run of one rank."""
    folder = tmp_path_factory.mktemp("two_ranks")
    command = tiny_arguments(
        corpus,
        folder / "halves",
        training__micro_batch_size=1,
        parallel__zero_stage=2,
        checkpoint__resume=runs.whole / "checkpoints" / "step-00000004",
        checkpoint__export_hf="bfloat16",
    )
    return run_distributed(on_two_ranks, 2, folder, command), folder


def test_a_save_that_fails_on_one_rank_leaves_the_last_checkpoint(two_ranks):
    one, two, three = "step-00000001", "step-00000002", "step-00000003"
    ranks, run_dir = two_ranks
    assert ranks[0] == ranks[1]
    messages, listings, latest = zip(*ranks[0], strict=True)
    full = "No space left on device (tensors.safetensors); free some space or choose another folder"
    assert messages == ("", full, full, "", "", full)
    assert listings == (
        ["latest", one],
        ["latest", one],  # nothing of the failed save is left to fill the disk
        ["latest", one],
        ["latest", one, two],
        ["latest", two, three],  # keep: 2
        ["latest", two, three],
    )
    assert latest == (one, one, one, two, three, three)
    folder = resolve_checkpoint(run_dir / "failures")
    with open_tensors(folder) as tensors:  # whole, with its checksums, from both ranks' files
        assert tensors.manifest.state.step == 3
        assert len(set(tensors.manifest.tensors.values())) == 2
        assert (folder / next(iter(tensors.manifest.files))).stat().st_mode == (folder / "config.yaml").stat().st_mode
        assert set(tensors.names("weight")) == set(tensors.names("exp_avg")) == set(tensors.names("exp_avg_sq"))


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_training_may_go_on_while_its_state_is_written(two_ranks, stage):
    _, folder = two_ranks
    states = []
    for name in (f"at-once-{stage}", f"beside-{stage}"):
        with open_tensors(resolve_checkpoint(folder / name)) as tensors:
            assert tensors.manifest.layout == {
                "tensor": 1, "pipeline": 1, "data": 2, "zero_stage": stage, "precision": "fp32"
            }  # fmt: skip
            keys = [key.partition("/")[::2] for key in tensors.manifest.tensors]
            states.append({(kind, parameter): tensors.get(kind, parameter).clone() for kind, parameter in keys})
    at_once, beside = states
    assert at_once.keys() == beside.keys()
    assert {kind for kind, _ in at_once} == {"weight", "exp_avg", "exp_avg_sq"}
    assert all(torch.equal(beside[key], tensor) for key, tensor in at_once.items())


def test_where_to_go_on_from(tmp_path):
    def config(resume):
        return small_config(training__run_dir=tmp_path / "run", checkpoint__resume=resume)

    assert find_resume(config("none")) == (None, [])
    assert find_resume(config("auto")) == (None, [])
    with pytest.raises(UserError, match="holds no complete checkpoint"):
        find_resume(config(tmp_path / "run"))
    unfinished = tmp_path / "run" / "checkpoints" / ".step-00000001.partial"
    unfinished.mkdir(parents=True)
    (unfinished / "manifest.json").write_text("{}")
    assert find_resume(config("auto")) == (None, [])


def test_going_on_with_another_micro_batch_and_two_ranks(two_ranks, runs):
    _, folder = two_ranks
    want, got = read_metrics(runs.whole)[4:], read_metrics(folder / "halves")
    assert [record["step"] for record in got] == [5, 6, 7, 8]
    for key in ("loss", "cross_entropy", "grad_norm", "penalty", "learning_rate"):
        assert [record[key] for record in got] == pytest.approx([record[key] for record in want], rel=1e-5)
    for key in ("samples", "refinements", "latent_step_histogram"):
        assert [record[key] for record in got] == [record[key] for record in want]
    assert got[-1]["validation_loss"] == pytest.approx(want[-1]["validation_loss"], rel=1e-5)


def test_a_run_exports_its_checkpoints_as_the_command_does(two_ranks, ponder, tmp_path):
    _, folder = two_ranks
    checkpoint = resolve_checkpoint(folder / "halves")
    assert f"exported {checkpoint / 'hf'}" in (folder / "halves" / "train.log").read_text()
    done = ponder("export-hf", "--checkpoint", checkpoint, "--output", tmp_path / "hf", "--dtype", "bfloat16")
    assert done.code == 0, done.err
    assert contents(checkpoint / "hf") == contents(tmp_path / "hf")
    assert run_status(folder / "halves").checkpoint.exported


@pytest.mark.slow
def test_a_grid_exports_and_keeps_what_it_is_told_to(ponder, corpus, tmp_path):
    run = tmp_path / "run"
    command = tiny_arguments(
        corpus,
        run,
        training__steps=5,
        training__eval_interval=0,
        checkpoint__interval=1,
        checkpoint__keep=1,
        checkpoint__keep_every=2,
        checkpoint__export_hf="float32",
        checkpoint__asynchronous="true",
        parallel__tensor=2,
        parallel__pipeline=2,
    )
    run_distributed(train_in_turn, 4, [command], time_limit=300)
    assert listing(run / "checkpoints") == ["latest", "step-00000002", "step-00000004", "step-00000005"]
    for step in (2, 4, 5):
        checkpoint, output = run / "checkpoints" / f"step-{step:08d}", tmp_path / f"hf-{step}"
        assert ponder("export-hf", "--checkpoint", checkpoint, "--output", output).code == 0
        assert contents(checkpoint / "hf") == contents(output)


def test_initialising_from_a_checkpoint_starts_at_step_0_with_its_weights(runs):
    anew = runs.anew
    records = of_steps(read_metrics(anew))
    assert [record["step"] for record in records] == [1, 2]
    assert [record["samples"] for record in records] == [4, 8]
    assert read_manifest(resolve_checkpoint(anew)).state.step == 2

    # the first recorded loss is that of the given weights, before any update, on the first batch of the new order
    config, parts = open_parts(read_config(["--config", str(anew / "config.yaml")]))
    tokens = next(validation_batches(parts.datasets["train"], 4, 4, 0, 1))
    objective, r = Objective(load_model(runs.whole).model), refinements(0, 7, config.ponder_training)
    _, sums = objective(tokens, r, objective.model.rule("soft"))
    assert records[0]["cross_entropy"] == pytest.approx(Tally.of(sums.sum(0)).mean_loss, rel=1e-5)

    # and what each step predicts by itself is measured with them too, on the first sequence
    _, sums = objective(tokens[:1], r, objective.model.rule("soft"), each_step=True)
    tally = Tally.of(sums.sum(0))
    assert records[0]["own_losses"] == pytest.approx([nats / tally.tokens for nats in tally.own_losses], rel=1e-5)
    assert records[0]["latent_steps_follow_loss"] is tally.steps_follow_loss is None  # all tokens take all steps so far
    assert records[0]["below_threshold"] == pytest.approx(1 - records[0]["mean_latent_steps"] / 2)
