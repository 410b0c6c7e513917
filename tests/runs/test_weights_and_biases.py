"""One run folder is one run of Weights & Biases, with its configuration, and no network is no reason not to train."""

import sys

import pytest

from megatron_ponder.base.errors import UserError
from megatron_ponder.config import LoggingConfig
from megatron_ponder.runs.metrics import MetricsLog
from megatron_ponder.runs.weights_and_biases import WandbRun, run_id

WANTED = LoggingConfig(tensorboard=False, wandb_project="p")


@pytest.fixture(autouse=True)
def nobody(tmp_path, monkeypatch):
    """Nobody is logged in, and nothing is asked for."""
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setattr("sys.stdin", open("/dev/null"))  # noqa: SIM115
    yield
    if "wandb" in sys.modules and sys.modules["wandb"] is not None:
        sys.modules["wandb"].teardown()  # it reads its environment once


def test_wandb_that_is_not_installed(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"pip install 'megatron_ponder\[wandb\]'"):
        MetricsLog(tmp_path, WANTED, 0)


def test_every_folder_is_a_run_of_its_own_for_all_its_starts(tmp_path):
    folders = [tmp_path / "a" / "seed-0", tmp_path / "b" / "seed-0"]
    for folder in folders:
        folder.mkdir(parents=True)
    first = [run_id(folder) for folder in folders]
    assert len(set(first)) == 2
    folders[0].rename(tmp_path / "moved")
    assert [run_id(tmp_path / "moved"), run_id(folders[1])] == first


def test_numbers_and_configuration_are_kept_without_a_network(tmp_path, monkeypatch, caplog):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    run_dir = tmp_path / "a" / "seed-0"
    run_dir.mkdir(parents=True)
    log = MetricsLog(run_dir, WANTED, 0, {"training": {"seed": 7}})
    shown = wandb.run
    assert (shown.id, shown.name, shown.config["training"]) == (run_id(run_dir), "a/seed-0", {"seed": 7})
    for step in (1, 2, 3):
        log.write({"step": step, "loss": 7.0 - step, "mean_latent_steps": 1.5, "latent_step_histogram": [1, 2]})
    kept = log._wandb.summary
    log.close()
    log._wandb.log({"loss": 3.0}, 4)  # the service has gone away, which costs a line
    assert "nothing more is sent" in caplog.messages[-1]
    assert kept["mean_latent_steps"] == 1.5
    assert kept["loss"] in (4.0, 5.0)  # a step is sent when the next one begins
    assert "latent_step_histogram" not in kept
    (stored,) = run_dir.glob("wandb/offline-run-*/*.wandb")
    assert stored.stat().st_size > 0


def test_who_is_not_logged_in_is_told_in_one_line(tmp_path):
    pytest.importorskip("wandb")
    with pytest.raises(UserError, match="lets nobody in") as it:
        WandbRun(tmp_path, "p", {})
    assert "; run `wandb login`, set WANDB_MODE=offline, or leave" in str(it.value)
    assert "\n" not in str(it.value)


def test_no_network_is_no_reason_not_to_train(tmp_path, monkeypatch, caplog):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_INIT_TIMEOUT", "3")
    run = WandbRun(tmp_path, "p", {})
    run.log({"loss": 1.0}, 1)
    run.finish()
    assert any("cannot be reached" in message for message in caplog.messages)
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))
