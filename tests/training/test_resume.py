"""A run that is killed and resumed is the run that was never interrupted, bit for bit."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from megatron_ponder.checkpoint.folders import resolve_checkpoint
from megatron_ponder.checkpoint.manifest import read_manifest
from megatron_ponder.checkpoint.optimizer_state import KINDS
from megatron_ponder.checkpoint.reader import open_tensors
from megatron_ponder.runs.metrics import read_metrics
from megatron_ponder.training.resuming import latents_taken_away
from megatron_ponder.training.step_watch import MEASURED
from tests import REPOSITORY
from tests.models import small_config
from tests.processes import SMALL, Forked
from tests.training.kills import reap, start_ranks


def start(arguments, ranks=1):
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    if ranks == 1:
        return Forked("train", *arguments, **streams)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(ranks), "pretrain_ponder.py"]
    return subprocess.Popen(
        [*launcher, *arguments], cwd=REPOSITORY, env=os.environ | SMALL, text=True, start_new_session=True, **streams
    )


def finish(process):
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return output


def kill_after(process, run_dir, step):
    """SIGKILL to every process of the run once it has recorded this step."""
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline and process.poll() is None:
        if (run_dir / "metrics.jsonl").exists() and (records := read_metrics(run_dir)) and records[-1]["step"] >= step:
            break
        time.sleep(0.005)
    assert process.poll() is None, process.communicate()[0]
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def essentials(run_dir):
    """What must not depend on an interruption: everything but times."""
    records = read_metrics(run_dir)
    return [{key: value for key, value in record.items() if key not in MEASURED} for record in records]


def final_state(run_dir):
    folder = resolve_checkpoint(run_dir)
    with open_tensors(folder) as tensors:
        return {(kind, name): tensors.get(kind, name) for kind in KINDS for name in tensors.names(kind)}


def assert_same_run(broken, whole):
    assert essentials(broken) == essentials(whole)
    want, got = final_state(whole), final_state(broken)
    assert want.keys() == got.keys()
    for key, tensor in want.items():
        assert torch.equal(got[key], tensor), key


# The penalty begins with the state that an earlier step has left, and what is trained changes on the way. So does the
# factor on latents.
STEERED = [
    "--ponder_training.latent_start=6",
    "--ponder_training.jacobi_iterations={0: 1, 2: 3}",
    "--ponder_training.router_start=12",
    "--ponder_training.target_latent_steps=0.5",
    "--ponder_training.target_rate=0.1",
    "--ponder_training.prune_start=18",
    "--ponder.router_initial_bias=0",
    "--ponder.latent_scale=learned",
    "--inference.threshold=0.35",
]
ON_BATCH = [
    "--ponder_training.penalty=batch",
    "--ponder_training.penalty_prior=[0.5, 0.3, 0.2]",
    "--ponder_training.penalty_weight=2",
    "--ponder_training.router_start=6",
]
AROUND_SWITCHES = tuple(step for switch in (6, 12, 18) for step in (switch - 1, switch, switch + 1))
MUON = ["--optimizer.name=muon", "--optimizer.muon_learning_rate=2e-3"]
# Steps of 2 sequences up to the tenth, of 4 up to the fifteenth, then of 6: the run is killed in the middle.
GROWING = ["--training.global_batch_size=6", "--training.micro_batch_size=1", "--training.batch_size_ramp=2 2 40"]
CASES = [
    pytest.param(["--parallel.zero_stage=1", *STEERED], 1, id="zero1-fp32", marks=pytest.mark.slow),
    pytest.param(["--parallel.zero_stage=0"], 1, id="zero0-fp32", marks=pytest.mark.slow),
    pytest.param(ON_BATCH, 1, id="penalty-on-batch", marks=pytest.mark.slow),
    pytest.param(["--parallel.zero_stage=1", "--training.precision=bf16"], 1, id="zero1-bf16", marks=pytest.mark.slow),
    pytest.param(["--parallel.zero_stage=2", "--training.precision=bf16"], 2, id="zero2-bf16", marks=pytest.mark.slow),
    pytest.param(["--parallel.zero_stage=2", *MUON], 2, id="zero2-muon", marks=pytest.mark.slow),
    pytest.param(["--training.precision=bf16", *MUON], 2, id="zero1-bf16-muon", marks=pytest.mark.slow),
    pytest.param(["--parallel.zero_stage=3"], 2, id="zero3-fp32", marks=pytest.mark.slow),
    pytest.param(["--parallel.context=2", *STEERED], 2, id="context", marks=pytest.mark.slow),
    pytest.param(["--parallel.context=2", *STEERED], 4, id="context, zero1", marks=pytest.mark.slow),
    pytest.param(["--parallel.zero_stage=2", *GROWING], 2, id="zero2-fp32, growing batch", marks=pytest.mark.slow),
    pytest.param(["--parallel.zero_stage=3", "--training.precision=bf16"], 2, id="zero3-bf16", marks=pytest.mark.slow),
]  # fmt: skip


@pytest.mark.parametrize(("overrides", "ranks"), CASES)
def test_killed_and_resumed_equals_uninterrupted(run_arguments, tmp_path, overrides, ranks):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    shorter = [*run_arguments, *overrides, "--training.steps=24"]
    finish(start([*shorter, f"--training.run_dir={whole}"], ranks))

    arguments = [*shorter, f"--training.run_dir={broken}", "--checkpoint.resume=auto"]
    kill_after(start(arguments, ranks), broken, step=14)
    assert read_manifest(resolve_checkpoint(broken)).state.step in (10, 20)
    output = finish(start(arguments, ranks))

    assert "going on after step" in output
    assert_same_run(broken, whole)


@pytest.mark.parametrize(
    ("ranks", "deaths"),
    [
        pytest.param(1, (6,), id="one rank, once"),
        pytest.param(1, AROUND_SWITCHES, id="one rank", marks=pytest.mark.slow),
        pytest.param(2, AROUND_SWITCHES, id="two ranks", marks=pytest.mark.slow),
    ],
)
def test_killed_around_every_switch_of_what_is_trained(run_arguments, tmp_path, ranks, deaths):
    """When latent steps begin, the router decides and pruned slots are not run: before, at it and after."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    shorter = [*run_arguments, *STEERED, "--training.steps=24", "--checkpoint.interval=1", "--parallel.zero_stage=1"]
    arguments = [*shorter, f"--training.run_dir={broken}", "--checkpoint.resume=auto"]
    for death in deaths:
        codes = reap(start_ranks(ranks, tmp_path / "output", arguments, steps=death), 200)
        assert -signal.SIGKILL in codes, (tmp_path / "output").read_text()
        assert read_manifest(resolve_checkpoint(broken)).state.step == death
    for run in (arguments, [*shorter, f"--training.run_dir={whole}"]):
        assert not any(reap(start_ranks(ranks, tmp_path / "output", run), 200)), (tmp_path / "output").read_text()
    steps = [record["mean_latent_steps"] for record in read_metrics(whole)]
    assert steps[:12] == [0] * 6 + [2] * 6
    assert any(0 < mean < 2 for mean in steps[18:])  # slots are left out
    assert len({record["latent_scale"] for record in read_metrics(whole)}) > 12  # from the first latents on
    assert_same_run(broken, whole)


def test_metrics_and_pictures_of_a_run(run_arguments, tmp_path):
    output = finish(start(run_arguments))
    run = tmp_path / "run"
    records = read_metrics(run)
    assert [record["step"] for record in records] == list(range(1, 41))
    needed = {"step", "loss", "grad_norm", "learning_rate", "mean_latent_steps", "tokens_per_second", "samples"}
    assert all(needed <= record.keys() for record in records)
    assert records[-1]["samples"] == 160
    assert records[-1]["cross_entropy"] < records[0]["cross_entropy"] - 0.5
    assert {record["refinements"] for record in records} == {2, 3}
    assert [record["step"] for record in records if "validation_loss" in record] == [20, 40]
    assert (run / "training.png").stat().st_size > 10_000
    assert list(run.glob("events.out.tfevents.*"))
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["latest", "step-00000030", "step-00000040"]
    assert "step 40/40" in output
    assert "tokens/s" in output


def test_latent_steps_that_would_be_taken_away_again_are_said(tmp_path):
    def later(start: int, **overrides):
        return small_config(ponder_training__latent_start=start, **overrides)

    folder = tmp_path / "checkpoint"
    (said,) = latents_taken_away(folder, 5, later(3), later(9))
    assert said.startswith("ponder_training.latent_start is 9, so that tokens have no latent steps again until then, ")
    assert said.endswith("was trained with them from step 3 on; set it to 3 to go on with them")
    for step, config in ((3, later(9)), (9, later(9)), (5, later(3)), (5, later(9, ponder__mode="vanilla"))):
        assert latents_taken_away(folder, step, later(3), config) == []
