"""What is read is what was written: damage is found and named, nothing in a checkpoint is executed."""

import hashlib
import os
import pickle
from pathlib import Path

import pytest
import torch

from megatron_ponder.base.errors import UserError
from megatron_ponder.checkpoint.folders import (
    MANIFEST,
    checkpoint_name,
    resolve_checkpoint,
)
from megatron_ponder.checkpoint.manifest import Manifest, read_manifest
from megatron_ponder.checkpoint.reader import open_tensors, read_config_of, read_weights, tokenizer_path
from megatron_ponder.checkpoint.run_state import RunState
from megatron_ponder.checkpoint.tensor_files import write_tensors
from megatron_ponder.checkpoint.writer import staged, write_description, write_weights_checkpoint
from tests.checkpoint.saved import TOKENIZER_FILES, WEIGHTS, fields_of, put
from tests.models import small_config

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


# Writes that fail -------------------------------------------------------------------------------------------------


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
