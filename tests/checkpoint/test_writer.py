"""What is written is whole or not there."""

import pytest
import torch

from megatron_ponder.base.errors import UserError
from megatron_ponder.checkpoint.folders import (
    checkpoint_name,
    checkpoints_in,
    partial_folders_in,
    resolve_checkpoint,
)
from megatron_ponder.checkpoint.manifest import Manifest
from megatron_ponder.checkpoint.reader import read_weights, tokenizer_path
from megatron_ponder.checkpoint.tensor_files import write_tensors
from megatron_ponder.checkpoint.writer import staged, write_description, write_weights_checkpoint
from tests.checkpoint.saved import WEIGHTS
from tests.models import small_config
from tests.processes import script


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
from megatron_ponder.checkpoint.writer import staged
with staged(Path(sys.argv[1])) as aside:
    write_tensors(aside, "w.safetensors", {"weight/a": torch.ones(3)})
    os._exit(9)
"""


FULL_DISK = """
import resource, signal, sys, torch
from pathlib import Path
from megatron_ponder.checkpoint.run_state import RunState
from megatron_ponder.checkpoint.writer import write_weights_checkpoint
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


def test_a_killed_write_is_no_checkpoint(checkpoint):
    following = checkpoint.with_name(checkpoint_name(5))
    assert script(KILLED, following).returncode == 9
    left = [path for path in checkpoint.parent.iterdir() if path != checkpoint]
    assert left  # half a checkpoint
    assert resolve_checkpoint(checkpoint.parent) == checkpoint
    assert checkpoints_in(checkpoint.parent) == [checkpoint]
    write_weights_checkpoint(following, WEIGHTS, small_config(), None)
    assert sorted(checkpoint.parent.iterdir()) == [checkpoint, following]


def test_a_full_disk_is_the_users_to_mend(checkpoint):
    following = checkpoint.with_name(checkpoint_name(5))
    done = script(FULL_DISK, following)
    assert "could not write" in done.stdout, done.stderr
    assert "free some space or choose another folder" in done.stdout
    assert list(checkpoint.parent.iterdir()) == [checkpoint]


KILLED_WHILE_REPLACING = """
import os, sys, torch
from pathlib import Path
from megatron_ponder.checkpoint import writer
from tests.checkpoint.saved import fields_of, put
from tests.models import small_config
def die(path, **_):
    if path.exists():
        os._exit(9)
with writer.staged(Path(sys.argv[1])) as aside:
    entry = writer.write_tensors(aside, "w", {"weight/new": torch.ones(2)})
    manifest = writer.Manifest(tensors={"weight/new": "w"}, files={"w": entry})
    writer.write_description(aside, manifest, small_config(), None)
    writer.shutil.rmtree = die
"""


def test_a_replaced_checkpoint_goes_only_when_the_new_one_has_its_name(checkpoint):
    done = script(KILLED_WHILE_REPLACING, checkpoint)
    assert done.returncode == 9, done.stderr
    assert list(read_weights(checkpoint)) == ["new"]
    assert [path.name for path in partial_folders_in(checkpoint.parent)] == [f".{checkpoint.name}.replaced.partial"]
    assert checkpoints_in(checkpoint.parent) == [checkpoint]
