"""What a run folder tells, during a run, after it, and when something is missing."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_ponder.base.errors import UserError
from megatron_ponder.checkpoint.folders import LATEST, MANIFEST
from megatron_ponder.checkpoint.manifest import read_manifest
from megatron_ponder.commands.status import lines_of
from megatron_ponder.runs.metrics import METRICS, read_metrics
from megatron_ponder.runs.starts import END, STARTS
from megatron_ponder.runs.status import PATIENCE, RECENT, run_status
from tests import REPOSITORY
from tests.finished_runs import LATEST as LATEST_NAME
from tests.finished_runs import STEPS, finished_runs

CONFIG = "training: {steps: 1000, global_batch_size: 4}\ndata: {sequence_length: 16}\n"
BEGUN = 1_700_000_000.0


def record(step: int, pace: float = 2.0, **more) -> dict:
    return {
        "step": step,
        "loss": 5.0,
        "mean_latent_steps": 1.2,
        "time": BEGUN + pace * step,
        "step_seconds": pace,
    } | more


@pytest.fixture
def run_dir(tmp_path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.yaml").write_text(CONFIG)
    return folder


def test_a_run_one_level_below_is_named(run_dir):
    with pytest.raises(UserError, match=rf"{run_dir.parent} is not a run folder: .*; did you mean {run_dir}\?$"):
        run_status(run_dir.parent)


def write(run_dir: Path, records: list[dict]) -> None:
    (run_dir / METRICS).write_text("".join(json.dumps(record) + "\n" for record in records))


def test_a_real_run_that_has_finished(corpus):
    run_dir = finished_runs(corpus).whole
    status = run_status(run_dir)
    last = json.loads((run_dir / METRICS).read_text().splitlines()[-1])
    assert (status.state, status.step, status.steps) == ("finished", STEPS, STEPS)
    assert (status.loss, status.validation_loss) == (last["loss"], last["validation_loss"])
    assert status.validation_step == STEPS
    assert (status.exact_loss, status.exact_gap) == (last["validation_exact_loss"], last["validation_exact_gap"])
    trained = f"with R of training {status.exact_loss - status.exact_gap:.4f}"
    assert lines_of(status)["validation by exact"] == f"{status.exact_loss:.4f}, {trained}"
    flops = sum(record["model_flops"] for record in read_metrics(run_dir))
    assert status.training_flops == pytest.approx(flops)
    assert read_manifest(run_dir / "checkpoints" / LATEST_NAME).state.training_flops == status.training_flops
    assert lines_of(status)["training compute"] == f"{flops:.3g} FLOPs"
    assert status.seconds_left is None
    assert status.checkpoint.name == LATEST_NAME
    assert status.checkpoint.step == STEPS
    assert status.checkpoint.complete
    assert status.checkpoint.kept == 2
    assert "complete; 2 are kept" in lines_of(status)["checkpoint"]
    assert status.saving is None


def test_the_names_are_those_that_are_written(corpus):
    checkpoints = finished_runs(corpus).whole / "checkpoints"
    assert (LATEST, MANIFEST) == ("latest", "manifest.json")
    assert (checkpoints / "latest").is_file()
    assert (checkpoints / LATEST_NAME / "manifest.json").is_file()


def test_a_run_under_way(run_dir):
    validated = {20: {"validation_loss": 4.5}}
    write(run_dir, [record(step, latent_scale=1 + step / 1000, **validated.get(step, {})) for step in range(1, 201)])
    status = run_status(run_dir, now=BEGUN + 405)
    assert status.state == "running"
    assert status.step == 200
    assert status.age == 5
    assert status.seconds_left == 800 * 2
    assert status.tokens_per_second == 4 * 16 / 2
    assert (status.validation_loss, status.validation_step) == (4.5, 20)  # far before the last records
    assert RECENT < 180
    assert (status.latent_scale, lines_of(status)["factor on latents"]) == (1.2, "1.2000")


def test_every_validation_set_has_its_loss(run_dir):
    losses = {"validation_loss": 4.5, "validation_loss/code": 4.0, "validation_loss/prose": None}
    write(run_dir, [{"step": 0} | losses])
    status = run_status(run_dir)
    assert (status.state, status.step, status.validation_step) == ("running", 0, 0)
    assert status.validation_losses == {"code": 4.0, "prose": None}
    said = {name: words for name, words in lines_of(status).items() if "loss" in name}
    assert said == {
        "validation loss": "4.5000 before the first step",
        "validation loss, code": "4.0000 before the first step",
        "validation loss, prose": "not finite before the first step",
    }
    write(run_dir, [{"step": 0} | losses, record(1), record(2, **losses), record(3)])
    status = run_status(run_dir, now=BEGUN + 7)
    assert (status.step, status.loss, status.seconds_left) == (3, 5.0, 997 * 2)
    assert lines_of(status)["validation loss, code"] == "4.0000 after step 2"
    assert json.loads(json.dumps(status.as_dict()))["validation_losses"] == {"code": 4.0, "prose": None}


def test_the_last_scores_of_tasks(run_dir):
    scores = {"tasks/next_line/acc": 0.25, "tasks/next_line/acc_norm": 0.5}
    write(run_dir, [record(1, **scores), record(2, **scores | {"tasks/next_line/acc": 0.75}), record(3)])
    status = run_status(run_dir)
    assert (status.task_scores, status.task_step) == ({"next_line/acc": 0.75, "next_line/acc_norm": 0.5}, 2)
    assert lines_of(status)["next_line acc"] == "0.7500 after step 2"
    assert "validation loss" not in lines_of(status)


def test_the_rate_is_that_of_this_start_and_of_the_last_steps(run_dir):
    slow = [record(step, pace=100.0) for step in range(1, 11)]
    fast = [record(step, time=BEGUN + 50_000 + 3 * step, step_seconds=3.0) for step in range(11, 21)]
    write(run_dir, slow + fast)
    assert run_status(run_dir, now=BEGUN + 50_065).seconds_left == pytest.approx(980 * 3)


def test_silence_depends_on_the_pace(run_dir):
    write(run_dir, [record(step) for step in range(1, 11)])
    assert run_status(run_dir, now=BEGUN + 20 + PATIENCE + 19).state == "running"
    assert run_status(run_dir, now=BEGUN + 20 + PATIENCE + 21).state == "silent"
    write(run_dir, [record(step, pace=600.0) for step in range(1, 11)])
    assert run_status(run_dir, now=BEGUN + 6000 + 5000).state == "running"


def test_a_line_that_is_being_written_is_left_out(run_dir):
    write(run_dir, [record(1), record(2)])
    with (run_dir / METRICS).open("a") as file:
        file.write(json.dumps(record(3))[:-20])
    assert run_status(run_dir).step == 2


@pytest.mark.parametrize("content", [None, "", '{"step": 1, "lo'])
def test_a_run_without_a_step(run_dir, content):
    if content is not None:
        (run_dir / METRICS).write_text(content)
    status = run_status(run_dir)
    assert (status.state, status.step, status.loss, status.checkpoint, status.restarts) == (
        "not started", 0, None, None, None
    )  # fmt: skip


def test_records_of_before_there_were_times(run_dir):
    write(run_dir, [{"step": step, "loss": 3.0, "tokens_per_second": 7.0} for step in (1, 2, 3)])
    status = run_status(run_dir)
    assert (status.state, status.tokens_per_second, status.seconds_left) == ("running", 7.0, None)


def test_starts_are_counted(run_dir):
    write(run_dir, [record(1)])
    starts = [{"time": BEGUN, "step": 0, "host": "a", "ranks": 2, "reason": "new"}, {"step": 40, "reason": "auto"}]
    (run_dir / STARTS).write_text("".join(json.dumps(start) + "\n" for start in starts))
    status = run_status(run_dir)
    assert (status.starts, status.restarts, status.last_start["step"]) == (2, 1, 40)


def test_a_run_that_has_said_why_it_stopped_is_not_silent(run_dir):
    (run_dir / END).write_text('{"time": 1.0, "reason": "SIGUSR1"}')
    assert run_status(run_dir).state == "stopped"
    write(run_dir, [record(1), record(2, loss=None)])
    status = run_status(run_dir)
    assert (status.state, status.end, status.loss, status.seconds_left) == ("stopped", "SIGUSR1", None, None)
    (run_dir / END).write_text("{")
    assert run_status(run_dir).state == "silent"


@pytest.mark.parametrize("damage", ["shorter", "missing"])
def test_a_damaged_checkpoint(corpus, tmp_path, damage):
    run_dir = shutil.copytree(finished_runs(corpus).whole, tmp_path / "run")
    checkpoint = run_dir / "checkpoints" / LATEST_NAME
    victim = next(checkpoint.glob("**/*.safetensors"))
    victim.write_bytes(victim.read_bytes()[:-1]) if damage == "shorter" else victim.unlink()
    assert not run_status(run_dir).checkpoint.complete
    (run_dir / "checkpoints" / "latest").write_bytes(b"\xff\0")
    (checkpoint / MANIFEST).write_text("{")
    assert not run_status(run_dir).checkpoint.complete
    shutil.rmtree(checkpoint)  # `latest` still names it
    earlier = run_status(run_dir).checkpoint
    assert (earlier.step, earlier.complete) == (4, True)


def test_a_save_that_did_not_end(run_dir):
    (run_dir / "checkpoints" / "step-00000010.partial").mkdir(parents=True)
    assert run_status(run_dir).saving == "step-00000010.partial"


def test_a_folder_that_is_no_run(tmp_path):
    with pytest.raises(UserError, match=r"has no config\.yaml"):
        run_status(tmp_path)
    (tmp_path / "config.yaml").write_text("training: 3")
    with pytest.raises(UserError, match="is not the configuration of a run"):
        run_status(tmp_path)


def test_pytorch_is_not_imported():
    code = "import sys, megatron_ponder.runs.status; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=False).returncode == 0
