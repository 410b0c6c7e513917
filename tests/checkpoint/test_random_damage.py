"""Damage drawn at random to any file of a checkpoint: one line, and the older one in its place, or the same state."""

import json
import random
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from megatron_ponder.base.errors import UserError
from megatron_ponder.checkpoint.folders import CONFIG, LATEST, MANIFEST, checkpoint_name, point_latest
from megatron_ponder.checkpoint.load import load_model
from megatron_ponder.checkpoint.manifest import read_manifest
from megatron_ponder.checkpoint.reader import open_tensors
from megatron_ponder.checkpoint.tensor_files import seal
from megatron_ponder.config import Config
from megatron_ponder.training.resuming import find_resume
from tests.checkpoint.saved import FILES, fields_of, put, put_without_checksum, save, tensors_of_a_run
from tests.damage import changed_bytes, changed_fields, draws
from tests.finished_runs import alone
from tests.models import small_config

SMALL = {"model__hidden_size": 8, "model__ffn_hidden_size": 8, "model__num_heads": 2, "model__num_layers": 1}
OLDER, NEWER = (checkpoint_name(step) for step in (7, 8))
FEW_AND_MANY = [(1, 25), pytest.param(2, 5000, marks=pytest.mark.slow)]


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> Path:
    """A run folder with two checkpoints."""
    run = tmp_path_factory.mktemp("sound") / "run"
    for step, name in ((7, OLDER), (8, NEWER)):
        save(run / "checkpoints" / name, tensors_of_a_run(seed=step, **SMALL), step, **SMALL)
    point_latest(run / "checkpoints", NEWER)
    return run


@pytest.fixture
def run(sound, tmp_path) -> Path:
    """A copy to damage."""
    return shutil.copytree(sound, tmp_path / "run")


def resuming(run: Path) -> Config:
    return small_config(training__run_dir=run, checkpoint__resume="auto", **SMALL)


def state_of(folder: Path) -> tuple[dict, bytes, dict[str, torch.Tensor]]:
    """All that a run goes on from."""
    with open_tensors(folder) as tensors:
        values = {key: tensors.get(*key.split("/", 1)).view(torch.int32) for key in tensors.manifest.tensors}
    return asdict(read_manifest(folder)), (folder / CONFIG).read_bytes(), values


def same(got: tuple, want: tuple) -> bool:
    values, expected = got[2], want[2]
    return got[:2] == want[:2] and values.keys() == expected.keys() and all(
        torch.equal(values[key], tensor) for key, tensor in expected.items()
    )  # fmt: skip


def damaged_copy(path: Path, whole: bytes, draw: random.Random) -> bytes:
    """Other bytes for a file: what a manifest says is changed as often as its bytes, and of tensors the header."""
    if path.name == MANIFEST and draw.random() < 0.5:
        return json.dumps(changed_fields(json.loads(whole), draw), indent=1).encode()
    if path.suffix == ".safetensors" and draw.random() < 0.7:
        return with_changed_header(whole, draw)
    return changed_bytes(whole, draw)


def with_changed_header(whole: bytes, draw: random.Random) -> bytes:
    """A safetensors file whose header has other bytes, and, half of the time, the length that says so."""
    end = 8 + int.from_bytes(whole[:8], "little")
    if draw.random() < 0.5:
        return changed_bytes(whole[:end], draw) + whole[end:]
    header = changed_bytes(whole[8:end], draw)
    return len(header).to_bytes(8, "little") + header + whole[end:]


@pytest.mark.parametrize(("seed", "tries"), FEW_AND_MANY)
def test_what_is_resumed_is_what_was_saved(run, seed, tries):
    """From the newer checkpoint the very same, or from the older one after one line."""
    newer, passed_over = run / "checkpoints" / NEWER, 0
    config, want = resuming(run), state_of(newer)
    with alone():
        for name, draw in draws(seed, tries):
            victim = newer / draw.choice((MANIFEST, MANIFEST, CONFIG, FILES[0], FILES[1]))
            whole = victim.read_bytes()
            victim.write_bytes(damaged_copy(victim, whole, draw))
            try:
                folder, problems = find_resume(config)
                assert folder.name == OLDER or same(state_of(folder), want)
                assert [problem.isprintable() for problem in problems] == [True] * (folder.name == OLDER)
            except Exception as error:
                raise AssertionError(f"{name}: {victim.name}") from error
            victim.write_bytes(whole)
            passed_over += folder.name == OLDER
    assert tries / 2 < passed_over


@pytest.mark.parametrize("write", [put, put_without_checksum])
@pytest.mark.parametrize(("seed", "tries"), FEW_AND_MANY)
def test_no_content_with_a_checksum_that_fits_is_a_traceback(run, seed, tries, write):
    """What only intent can make, and what manifests of before have no checksum against: one line, or it is taken."""
    shutil.rmtree(run / "checkpoints" / OLDER)
    folder = run / "checkpoints" / NEWER
    victim, refused = folder / FILES[0], 0
    fields, whole, config = fields_of(folder), victim.read_bytes(), resuming(run)
    with alone():
        for name, draw in draws(seed, tries):
            changed = dict(fields)
            if draw.random() < 0.5:
                changed = changed_fields(fields, draw)
            else:
                victim.write_bytes(with_changed_header(whole, draw))
                changed["files"] = fields["files"] | {victim.name: seal(victim)}
            write(folder, changed)
            for use in (lambda: find_resume(config), lambda: load_model(folder)):
                try:
                    use()
                except UserError as error:
                    refused += str(error).isprintable()
                except Exception as error:
                    raise AssertionError(name) from error
            victim.write_bytes(whole)
    assert tries / 2 < refused


@pytest.mark.parametrize("said", [b"\xff\xfe\0", b"/etc", b"../checkpoints", b"step-99999999", None])
def test_latest_may_be_anything(run, said):
    pointer = run / "checkpoints" / LATEST
    pointer.unlink()
    pointer.mkdir() if said is None else pointer.write_bytes(said)
    with alone():
        folder, problems = find_resume(resuming(run))
    assert folder.name == NEWER
    assert problems == [f"{pointer} names no complete checkpoint beside it"]
    point_latest(run / "checkpoints", OLDER)
    assert pointer.read_text() == f"{OLDER}\n"
    assert len(list(pointer.parent.glob("latest.*"))) == (said is None)  # a folder is kept by another name


def test_a_manifest_of_another_step_is_refused_even_without_a_checksum(run):
    path = run / "checkpoints" / NEWER / MANIFEST
    content = json.loads(path.read_text()) | {"step": 9, "format": 1}
    del content["checksum"]
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match="is damaged \\(its step is 9\\)"):
        read_manifest(path.parent)


@pytest.mark.parametrize("kind", ["weight", "exp_avg", "exp_avg_sq"])
def test_a_checkpoint_that_is_not_finite_is_passed_over(run, kind):
    newer, tensors = run / "checkpoints" / NEWER, tensors_of_a_run(**SMALL)
    tensors[f"{kind}/embedding.weight"][3, 2] = float("nan")
    save(newer, tensors, 8, **SMALL)
    said = f"{newer}: the {kind} of embedding.weight holds 1 NaN and 0 infinite values; use an older checkpoint"
    with alone():
        folder, problems = find_resume(resuming(run))
        assert (folder.name, problems) == (OLDER, [said])
        if kind == "weight":
            with pytest.raises(UserError, match=said):
                load_model(newer)
        else:
            load_model(newer)  # which has no use for moments


def test_a_checkpoint_without_the_state_of_its_model_is_passed_over(run):
    newer = run / "checkpoints" / NEWER
    for change, said in (
        ({"exp_avg/head.weight": None}, "differ in exp_avg/head.weight; use another checkpoint"),
        ({"weight/extra": torch.ones(2)}, "differ in weight/extra; use"),
        ({"weight/head.weight": torch.ones(8, 61)}, r"has shape (8, 61) where (61, 8) belongs"),
    ):
        tensors = tensors_of_a_run(**SMALL) | change
        save(newer, {key: tensor for key, tensor in tensors.items() if tensor is not None}, 8, **SMALL)
        with alone():
            folder, (problem,) = find_resume(resuming(run))
        assert folder.name == OLDER
        assert said in problem
