"""Which folder of checkpoints is meant, which checkpoint counts, and which go."""

import errno
from pathlib import Path

import pytest

from megatron_ponder.base.errors import UserError
from megatron_ponder.checkpoint import folders
from megatron_ponder.checkpoint.folders import (
    MANIFEST,
    checkpoint_name,
    checkpoints_in,
    latest_checkpoint,
    partial_folders_in,
    point_latest,
    resolve_checkpoint,
    retain,
)
from megatron_ponder.checkpoint.writer import write_weights_checkpoint
from tests.checkpoint.saved import WEIGHTS
from tests.models import small_config


def complete(folder: Path, *steps: int) -> list[Path]:
    """Further checkpoints in a folder of checkpoints."""
    paths = [folder / checkpoint_name(step) for step in steps]
    for path in paths:
        write_weights_checkpoint(path, WEIGHTS, small_config(), None)
    return paths


def test_a_checkpoint_may_be_named_in_three_ways(checkpoint):
    for path in (checkpoint, checkpoint.parent, checkpoint.parent.parent, str(checkpoint.parent.parent)):
        assert resolve_checkpoint(path) == checkpoint


def test_nothing_to_resolve(tmp_path):
    for path in (tmp_path, tmp_path / "absent"):
        with pytest.raises(UserError, match=f"{path} holds no complete checkpoint"):
            resolve_checkpoint(path)


def test_a_run_one_level_below_is_named(checkpoint):
    run_dir = checkpoint.parents[1]
    with pytest.raises(UserError, match=rf"{run_dir.parent} holds no complete checkpoint; did you mean {run_dir}\?$"):
        resolve_checkpoint(run_dir.parent)


def test_latest_names_one_and_without_it_the_newest_counts(tmp_path):
    first, second, third = complete(tmp_path, 5, 20, 100)
    assert checkpoints_in(tmp_path) == [first, second, third]
    assert latest_checkpoint(tmp_path) == third
    point_latest(tmp_path, second.name)
    assert latest_checkpoint(tmp_path) == resolve_checkpoint(tmp_path) == second
    point_latest(tmp_path, first.name)
    assert latest_checkpoint(tmp_path) == first
    (first / MANIFEST).unlink()  # incomplete after all
    assert latest_checkpoint(tmp_path) == third
    (tmp_path / "latest").write_text("step-99999999\n")
    assert latest_checkpoint(tmp_path) == third
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_retention_keeps_the_newest(tmp_path):
    paths = complete(tmp_path, 5, 20, 100, 1000)
    (tmp_path / "step-99999999").mkdir()  # incomplete: not ours to count
    retain(tmp_path, 9)
    assert checkpoints_in(tmp_path) == paths
    retain(tmp_path, 2)
    assert checkpoints_in(tmp_path) == paths[2:]
    assert sorted(path.name for path in tmp_path.iterdir()) == [paths[2].name, paths[3].name, "step-99999999"]
    retain(tmp_path, 1)
    assert checkpoints_in(tmp_path) == paths[3:]


def test_retention_never_removes_the_latest(tmp_path):
    """A run that has gone back to an older checkpoint writes smaller numbers than are there."""
    paths = complete(tmp_path, 4, 8, 12)
    new = complete(tmp_path, 6)[0]
    point_latest(tmp_path, new.name)
    retain(tmp_path, 2)
    assert checkpoints_in(tmp_path) == [new, paths[2]]
    retain(tmp_path, 1)
    assert checkpoints_in(tmp_path) == [new]


def test_multiples_are_kept_beside_the_newest(tmp_path):
    paths = complete(tmp_path, 0, 5, 10, 15, 20, 25)
    retain(tmp_path, keep=2, keep_every=10)
    assert checkpoints_in(tmp_path) == [paths[step // 5] for step in (10, 20, 25)]
    complete(tmp_path, 30, 35)
    point_latest(tmp_path, "step-00000020")  # gone back to
    retain(tmp_path, keep=1, keep_every=10)
    assert [path.name for path in checkpoints_in(tmp_path)] == [checkpoint_name(step) for step in (10, 20, 30)]


def test_a_removal_that_is_killed_leaves_no_half_checkpoint(tmp_path, monkeypatch):
    old, new = complete(tmp_path, 5, 10)

    def killed(folder: Path, **_) -> None:
        if folder.exists():
            (folder / "weights-00000.safetensors").unlink()
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(folders.shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            retain(tmp_path, 1)
    assert not old.exists()
    assert checkpoints_in(tmp_path) == [new]
    assert [path.name for path in partial_folders_in(tmp_path)] == [".step-00000005.removed.partial"]


def test_a_checkpoint_that_cannot_be_removed_is_whole_and_named(tmp_path, monkeypatch, caplog):
    old, new = complete(tmp_path, 5, 10)

    def refused(*_) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "rename", refused)
    retain(tmp_path, 1)
    assert checkpoints_in(tmp_path) == [old, new]
    assert f"{old} could not be removed: Permission denied; remove it yourself" in caplog.text
