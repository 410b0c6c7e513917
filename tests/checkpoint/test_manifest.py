"""Manifests: what is written is read, and nothing else is taken for one; which checkpoint `latest` names."""

import json
from pathlib import Path

import pytest

from megatron_ponder.base.errors import UserError
from megatron_ponder.checkpoint.folders import LATEST, MANIFEST, checkpoint_name, latest_checkpoint, latest_problem
from megatron_ponder.checkpoint.manifest import Manifest, read_manifest, write_manifest
from megatron_ponder.checkpoint.run_state import RunState
from tests.checkpoint.saved import fields_of, put, put_without_checksum

WHOLE = Manifest(
    RunState(
        118,
        944,
        15104,
        skipped=[3, 118],
        validated=False,
        training_flops=3e21,
        penalty_factor=0.25,
        penalty_steps=1.5,
        penalty_shares=[0.75, 0.25],
    ),
    data_fingerprint="ab12",
    tensors={"weight/a.b": "t.safetensors", "exp_avg/a.b": "t.safetensors"},
    files={"t.safetensors": (800, "0" * 64), "config.yaml": (3, "f" * 64), "tokenizer/tokenizer.json": (2, "a" * 64)},
    layout={"tensor": 2, "precision": "bf16"},
)


@pytest.fixture
def folder(tmp_path) -> Path:
    """A checkpoint's folder that has nothing but a manifest."""
    folder = tmp_path / "checkpoints" / checkpoint_name(118)
    folder.mkdir(parents=True)
    write_manifest(folder, WHOLE)
    return folder


def test_round_trip(folder):
    assert read_manifest(folder) == WHOLE
    assert [path.name for path in folder.iterdir()] == [MANIFEST]
    content = json.loads((folder / MANIFEST).read_text())
    assert (content["format"], len(content["checksum"])) == (2, 64)
    (folder / MANIFEST).write_text(json.dumps(content))  # laid out otherwise, it says the same
    assert read_manifest(folder) == WHOLE


def test_a_flipped_bit_is_found(folder):
    path = folder / MANIFEST
    whole = path.read_bytes()
    for bit in range(0, 8 * len(whole), 11):  # every bit of a byte, some bytes of every entry
        place = bit // 8
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << bit % 8]) + whole[place + 1 :])
        with pytest.raises(UserError, match=f"{MANIFEST} is damaged|has checkpoint format"):
            read_manifest(folder)


def test_one_from_before_there_were_checksums_is_read(folder):
    fields = fields_of(folder)
    put_without_checksum(folder, fields)
    assert read_manifest(folder) == WHOLE
    penalty = ("penalty_factor", "penalty_steps", "penalty_shares")
    for later in ("layout", "tokens", "skipped", "validated", "training_flops", *penalty):
        del fields[later]  # than the first manifests
    put_without_checksum(folder, fields)
    found = read_manifest(folder)
    assert (found.state.step, found.state.validated, found.layout) == (118, True, {})
    assert found.state.tokens is None
    assert found.state.training_flops is None  # of 118 steps that nobody has counted


def test_a_checksum_cannot_be_left_out(folder):
    fields = fields_of(folder)
    (folder / MANIFEST).write_text(json.dumps(fields))
    with pytest.raises(UserError, match=rf"{MANIFEST} is damaged \(its checksum differs\); resume from another check"):
        read_manifest(folder)
    put(folder, fields)
    assert read_manifest(folder) == WHOLE
    put(folder, fields | {"format": 1})
    with pytest.raises(UserError, match="'checksum' is no part of a manifest"):
        read_manifest(folder)


@pytest.mark.parametrize("later", [3, 10])
def test_a_later_format_is_refused(folder, later):
    put(folder, fields_of(folder) | {"format": later})
    with pytest.raises(UserError, match=f"has checkpoint format {later}, this version reads up to 2; update the"):
        read_manifest(folder)


FILES = {name: list(entry) for name, entry in WHOLE.files.items()}
NONSENSE = [
    ("step", [-1, True, 1.0, "118", None, 2**63, [], 117]),  # the last one before a skipped step
    ("samples", [-1, False, 944.0, None]),
    ("data_fingerprint", [1, "a\nb", "\ud800", {}]),
    ("tokenizer_fingerprint", [0, []]),
    ("tensors", [None, [], {"weight/a": 1}, {"weight/a": "other"}, {"a": "t.safetensors"}, {"weight/": "config.yaml"}]),
    ("files", [None, [], {}, FILES | {"t.safetensors": 800}, FILES | {"t.safetensors": [800, "0" * 63]}]),
    ("files", [FILES | {name: [1, "0" * 64]} for name in ("../x", "/etc/passwd", "a/../../x", "", ".", "a//b", "a\0")]),
    ("files", [FILES | {"t.safetensors": [-1, "0" * 64]}, {name: FILES[name] for name in FILES if "yaml" not in name}]),
    ("skipped", [None, 3, [0], [119], [3, 3], [118, 3], ["3"], [True]]),
    ("tokens", [-1, 1.5, "1", True, 2**63]),
    ("training_flops", [-1.0, "1", True, 10**400]),
    ("validated", [0, None, "false"]),
    ("penalty_factor", [None, -0.5, "1", True, [1.0], 10**400]),
    ("penalty_steps", [-0.5, "1", False]),
    ("penalty_shares", [0.5, ["1"], [True], {}, [-0.5]]),
    ("layout", [None, [], {"tensor": 1.5}, {"tensor": None}, {"tensor": {}}]),
    ("surprise", [1]),
]


@pytest.mark.parametrize("write", [put, put_without_checksum])
@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in NONSENSE for value in values])
def test_what_cannot_be_is_refused_whatever_the_checksum(folder, write, name, value):
    write(folder, fields_of(folder) | {name: value})
    with pytest.raises(UserError, match=f"{MANIFEST} is damaged") as caught:
        read_manifest(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [0, -1, "2", 2.0, True, None])
def test_a_format_that_cannot_be(folder, value):
    put(folder, fields_of(folder) | {"format": value})
    with pytest.raises(UserError, match="its format cannot be"):
        read_manifest(folder)


@pytest.mark.parametrize("gone", ["step", "samples", "tensors", "files"])
def test_what_is_lacking_is_named(folder, gone):
    fields = fields_of(folder)
    del fields[gone]
    put(folder, fields)
    with pytest.raises(UserError, match=rf"is damaged \(it lacks {gone}\)"):
        read_manifest(folder)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "it is no JSON"),
        (b"\xff\xfe", "it is no JSON"),
        (b"[]", "it is no JSON object"),
        (b"null", "it is no JSON object"),
        (b"[" * 100_000, "it is no JSON"),
        (b'{"step": NaN}', "it holds NaN"),
        (b'{"step": ' + b"9" * 5000 + b"}", "Exceeds the limit"),
    ],
)
def test_no_manifest_at_all(folder, content, said):
    (folder / MANIFEST).write_bytes(content)
    with pytest.raises(UserError, match=rf"is damaged \({said}"):
        read_manifest(folder)


# latest -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def checkpoints(tmp_path) -> Path:
    """A folder of two checkpoints, and one beside it."""
    for path in ("run/step-00000005", "run/step-00000020", "step-00000007"):
        (tmp_path / path).mkdir(parents=True)
        write_manifest(tmp_path / path, WHOLE)
    return tmp_path / "run"


def test_latest_names_one(checkpoints):
    assert (latest_checkpoint(checkpoints).name, latest_problem(checkpoints)) == ("step-00000020", None)
    (checkpoints / LATEST).write_text("step-00000005\n")
    assert (latest_checkpoint(checkpoints).name, latest_problem(checkpoints)) == ("step-00000005", None)


@pytest.mark.parametrize(
    "said",
    [
        b"",
        b"\xff\xfe\0",
        b"step-99999999",
        b"../step-00000007",
        b"{beside}",
        b".",
        b"..",
        b"a" * 5000,
        b"step-\0",
        None,
    ],
)
def test_whatever_else_latest_is_the_newest_counts(checkpoints, said):
    if said is None:
        (checkpoints / LATEST).mkdir()
    else:
        beside = str(checkpoints.parent / "step-00000007").encode()
        (checkpoints / LATEST).write_bytes(said.replace(b"{beside}", beside))
    assert latest_checkpoint(checkpoints) == checkpoints / "step-00000020"
    assert latest_problem(checkpoints) == f"{checkpoints / LATEST} names no complete checkpoint beside it"
