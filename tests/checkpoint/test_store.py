"""Checkpoints on disk: whole or not there, damage is found and named, nothing in them is executed."""

import hashlib
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_ponder.base.errors import UserError
from megatron_ponder.checkpoint.manifest import (
    MANIFEST,
    Manifest,
    checkpoint_name,
    checkpoints_in,
    latest_checkpoint,
    read_manifest,
)
from megatron_ponder.checkpoint.run_state import RunState
from megatron_ponder.checkpoint.store import (
    open_tensors,
    partial_folders_in,
    point_latest,
    read_config_of,
    read_weights,
    resolve_checkpoint,
    retain,
    staged,
    tokenizer_path,
    write_description,
    write_weights_checkpoint,
)
from megatron_ponder.checkpoint.tensor_files import write_tensors
from tests.checkpoint.saved import fields_of, put
from tests.models import small_config

WEIGHTS = {"a.weight": torch.arange(12.0).view(3, 4), "b": torch.tensor([0.1, -0.2]), "scalar": torch.tensor(3.0)}
TOKENIZER_FILES = {"tokenizer.json": "{}", "tokenizer_config.json": '{"eos_token": "</s>"}'}


@pytest.fixture
def tokenizer(tmp_path) -> Path:
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    for name, text in {**TOKENIZER_FILES, "notes.txt": "not part of it"}.items():
        (folder / name).write_text(text)
    return folder


@pytest.fixture
def checkpoint(tmp_path, tokenizer) -> Path:
    """One complete checkpoint of a run."""
    folder = tmp_path / "run" / "checkpoints" / checkpoint_name(0)
    write_weights_checkpoint(folder, WEIGHTS, small_config(), tokenizer)
    return folder


def complete(folder: Path, *steps: int) -> list[Path]:
    """Further checkpoints in a folder of checkpoints."""
    paths = [folder / checkpoint_name(step) for step in steps]
    for path in paths:
        write_weights_checkpoint(path, WEIGHTS, small_config(), None)
    return paths


# Round trip -------------------------------------------------------------------------------------------------------


def test_round_trip(checkpoint):
    weights = read_weights(checkpoint)
    assert list(weights) == list(WEIGHTS)
    for name, expected in WEIGHTS.items():
        assert torch.equal(weights[name], expected)
    assert read_config_of(checkpoint) == small_config()
    assert {p.name: p.read_text() for p in tokenizer_path(checkpoint).iterdir()} == TOKENIZER_FILES
    assert read_manifest(checkpoint).state == RunState()


def test_weights_are_kept_whole_and_in_fp32(tmp_path):
    transposed = torch.randn(4, 6).T
    write_weights_checkpoint(
        tmp_path / "c", {"t": transposed, "h": torch.tensor([0.1]).bfloat16()}, small_config(), None
    )
    weights = read_weights(tmp_path / "c")
    assert torch.equal(weights["t"], transposed)
    assert weights["h"].dtype == torch.float32
    assert torch.equal(weights["h"], torch.tensor([0.1]).bfloat16().float())


def test_tensors_of_several_files_and_kinds(tmp_path):
    parts = [{"weight/a": torch.ones(2), "exp_avg/a": torch.zeros(2)}, {"weight/b": torch.full((3,), 2.0)}]
    with staged(tmp_path / "c") as aside:
        entries = {f"{i}.safetensors": write_tensors(aside, f"{i}.safetensors", part) for i, part in enumerate(parts)}
        tensors = {key: f"{i}.safetensors" for i, part in enumerate(parts) for key in part}
        manifest = Manifest(RunState(7, 56), data_fingerprint="d", tensors=tensors, files=entries)
        write_description(aside, manifest, small_config(), None)
    with open_tensors(tmp_path / "c") as reader:
        assert (reader.manifest.state.step, reader.manifest.state.samples, reader.manifest.data_fingerprint) == (
            7,
            56,
            "d",
        )
        assert reader.names("weight") == ["a", "b"]
        assert reader.names("exp_avg") == ["a"]
        assert torch.equal(reader.get("weight", "b"), parts[1]["weight/b"])
        with pytest.raises(UserError, match="no exp_avg of b; it was made for another model configuration"):
            reader.get("exp_avg", "b")
        weights = reader.of_kind("weight")
        assert (list(weights), len(weights)) == (["a", "b"], 2)
        assert torch.equal(weights["b"], parts[1]["weight/b"])
        assert "b" not in reader.of_kind("exp_avg")
        with pytest.raises(KeyError):
            reader.of_kind("exp_avg")["b"]
    assert tokenizer_path(tmp_path / "c") is None


@pytest.mark.parametrize(("name", "copied"), [("bpe.model", "tokenizer.model"), ("bpe.json", "tokenizer.json")])
def test_a_tokenizer_file_is_copied_under_its_usual_name(tmp_path, name, copied):
    (tmp_path / name).write_bytes(b"tokens")
    write_weights_checkpoint(tmp_path / "c", WEIGHTS, small_config(), tmp_path / name)
    assert [(p.name, p.read_bytes()) for p in tokenizer_path(tmp_path / "c").iterdir()] == [(copied, b"tokens")]


def test_an_output_folder_that_is_taken_is_refused(tmp_path, checkpoint):
    with pytest.raises(UserError, match="exists already; choose another output folder"):
        write_weights_checkpoint(checkpoint, WEIGHTS, small_config(), None)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="exists already"):
        write_weights_checkpoint(tmp_path / "file", WEIGHTS, small_config(), None)
    (tmp_path / "empty").mkdir()
    write_weights_checkpoint(tmp_path / "empty", WEIGHTS, small_config(), None)
    assert read_weights(tmp_path / "empty").keys() == WEIGHTS.keys()


# Writes that fail -------------------------------------------------------------------------------------------------


def test_a_failed_write_leaves_the_older_checkpoint(checkpoint):
    def fail_half_way():
        with staged(checkpoint) as aside:
            write_tensors(aside, "weights.safetensors", {"weight/a": torch.ones(3)})
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_half_way()
    assert read_weights(checkpoint).keys() == WEIGHTS.keys()
    assert [path.name for path in checkpoint.parent.iterdir()] == [checkpoint.name]


def test_a_second_write_replaces_the_first(checkpoint):
    with staged(checkpoint) as aside:
        entry = write_tensors(aside, "w.safetensors", {"weight/new": torch.ones(3)})
        files = Manifest(tensors={"weight/new": "w.safetensors"}, files={"w.safetensors": entry})
        write_description(aside, files, small_config(), None)
    assert list(read_weights(checkpoint)) == ["new"]
    assert [path.name for path in checkpoint.parent.iterdir()] == [checkpoint.name]


KILLED = """
import os, sys, torch
from pathlib import Path
from megatron_ponder.checkpoint.tensor_files import write_tensors
from megatron_ponder.checkpoint.run_state import RunState
from megatron_ponder.checkpoint.store import staged
with staged(Path(sys.argv[1])) as aside:
    write_tensors(aside, "w.safetensors", {"weight/a": torch.ones(3)})
    os._exit(9)
"""
FULL_DISK = """
import resource, signal, sys, torch
from pathlib import Path
from megatron_ponder.checkpoint.run_state import RunState
from megatron_ponder.checkpoint.store import write_weights_checkpoint
from megatron_ponder.base.errors import UserError
from tests.checkpoint.saved import fields_of, put
from tests.models import small_config
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    write_weights_checkpoint(Path(sys.argv[1]), {"a": torch.zeros(100_000)}, small_config(), None)
except UserError as error:
    print(error)
"""


def run(script: str, folder: Path) -> subprocess.CompletedProcess:
    root = Path(__file__).parent.parent.parent
    environ = os.environ | {"PYTHONPATH": str(root)}
    command = [sys.executable, "-c", script, str(folder)]
    return subprocess.run(command, capture_output=True, text=True, env=environ, check=False)


def test_a_killed_write_is_no_checkpoint(checkpoint):
    following = checkpoint.with_name(checkpoint_name(5))
    assert run(KILLED, following).returncode == 9
    left = [path for path in checkpoint.parent.iterdir() if path != checkpoint]
    assert left  # half a checkpoint
    assert resolve_checkpoint(checkpoint.parent) == checkpoint
    assert checkpoints_in(checkpoint.parent) == [checkpoint]
    write_weights_checkpoint(following, WEIGHTS, small_config(), None)
    assert sorted(checkpoint.parent.iterdir()) == [checkpoint, following]


def test_a_full_disk_is_the_users_to_mend(checkpoint):
    following = checkpoint.with_name(checkpoint_name(5))
    done = run(FULL_DISK, following)
    assert "could not write" in done.stdout, done.stderr
    assert "free some space or choose another folder" in done.stdout
    assert list(checkpoint.parent.iterdir()) == [checkpoint]


def test_tensors_that_are_not_finite_are_refused_by_name(checkpoint):
    weights = WEIGHTS | {"b": torch.tensor([float("nan"), 1.0])}
    following = checkpoint.with_name(checkpoint_name(5))
    write_weights_checkpoint(following, weights, small_config(), None)
    said = rf"{following}: the weight of b holds 1 NaN and 0 infinite values; use an older checkpoint"
    with pytest.raises(UserError, match=said):
        read_weights(following)
    with open_tensors(following) as tensors:
        assert torch.equal(tensors.get("weight", "a.weight"), WEIGHTS["a.weight"]), "the others can be read"


# Damage -----------------------------------------------------------------------------------------------------------

FILES = ["weights-00000.safetensors", "config.yaml", "tokenizer/tokenizer.json"]


def test_files_that_have_been_verified_are_not_verified_again(checkpoint):
    flip_a_bit(checkpoint / FILES[1])
    with pytest.raises(UserError, match="is damaged"), open_tensors(checkpoint):
        pass
    with open_tensors(checkpoint, verified=True) as tensors:
        assert tensors.names("weight") == list(WEIGHTS)


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) * 3 // 4] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(
    ("damage", "said"),
    [(Path.unlink, "is missing"), (truncate, "bytes where"), (flip_a_bit, "is damaged (its checksum differs)")],
)
def test_a_damaged_file_is_named(checkpoint, name, damage, said):
    damage(checkpoint / name)
    with pytest.raises(UserError) as caught:
        read_weights(checkpoint)
    assert f"{checkpoint / name} " in str(caught.value)
    assert said in str(caught.value)
    assert f"delete {checkpoint}" in str(caught.value)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"files": []}', '{"files": {}, "surprise": 1}', "\xff\x00"])
def test_a_damaged_manifest_is_named(checkpoint, content):
    (checkpoint / MANIFEST).write_bytes(content.encode("latin-1"))
    with pytest.raises(UserError, match=f"{checkpoint / MANIFEST} is damaged"):
        read_weights(checkpoint)


def test_no_manifest_is_no_checkpoint(checkpoint):
    (checkpoint / MANIFEST).unlink()
    with pytest.raises(UserError, match="no complete checkpoint"):
        read_weights(checkpoint)
    with pytest.raises(UserError, match=f"{checkpoint} holds no complete checkpoint; give a run folder"):
        resolve_checkpoint(checkpoint)


class Payload:
    """Would leave a file behind if it were unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_pickled_code_is_not_executed(checkpoint, tmp_path):
    weights = checkpoint / FILES[0]
    weights.write_bytes(pickle.dumps(Payload(tmp_path / "executed")))
    fields, content = fields_of(checkpoint), weights.read_bytes()
    fields["files"][weights.name] = [len(content), hashlib.sha256(content).hexdigest()]
    put(checkpoint, fields)
    with pytest.raises(UserError, match=f"{weights} is no safetensors file"):
        read_weights(checkpoint)
    assert not (tmp_path / "executed").exists()


# Which checkpoint -------------------------------------------------------------------------------------------------


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


KILLED_WHILE_REPLACING = """
import os, sys, torch
from pathlib import Path
from megatron_ponder.checkpoint import store
from tests.checkpoint.saved import fields_of, put
from tests.models import small_config
def die(path, **_):
    if path.exists():
        os._exit(9)
with store.staged(Path(sys.argv[1])) as aside:
    entry = store.write_tensors(aside, "w", {"weight/new": torch.ones(2)})
    manifest = store.Manifest(tensors={"weight/new": "w"}, files={"w": entry})
    store.write_description(aside, manifest, small_config(), None)
    store.shutil.rmtree = die
"""


def test_a_replaced_checkpoint_goes_only_when_the_new_one_has_its_name(checkpoint):
    done = run(KILLED_WHILE_REPLACING, checkpoint)
    assert done.returncode == 9, done.stderr
    assert list(read_weights(checkpoint)) == ["new"]
    assert [path.name for path in partial_folders_in(checkpoint.parent)] == [f".{checkpoint.name}.replaced.partial"]
    assert checkpoints_in(checkpoint.parent) == [checkpoint]
