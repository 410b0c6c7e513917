"""Headers and tensors of safetensors folders; whatever is wrong with them is one line."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from megatron_ponder.base.errors import UserError
from megatron_ponder.hf.weight_files import WeightFiles, read_json, weight_files

INDEX = "model.safetensors.index.json"


def save(folder, **files):
    """Files of tensors, and an index that names each tensor's."""
    for name, tensors in files.items():
        save_file(tensors, folder / f"{name}.safetensors")
    named = {key: f"{name}.safetensors" for name, tensors in files.items() for key in tensors}
    (folder / INDEX).write_text(json.dumps({"weight_map": named}))


def whole(folder) -> None:
    found = WeightFiles(weight_files(folder))
    for name in found.described:
        found.require_finite(name, found.mapped(name).float())


def test_headers_and_tensors(tmp_path):
    save(tmp_path, a={"x": torch.ones(2, 3).half()}, b={"y": torch.full((4,), 2.0).bfloat16(), "z": torch.ones(())})
    files = weight_files(tmp_path)
    assert [path.name for path in files] == ["a.safetensors", "b.safetensors"]
    found = WeightFiles(files)
    described = found.described
    assert {name: tuple(tensor.shape) for name, tensor in described.items()} == {"x": (2, 3), "y": (4,), "z": ()}
    assert all(tensor.is_meta for tensor in described.values())
    assert found.mapped("y").tolist() == [2.0] * 4
    assert found.mapped("x").dtype == torch.float16


def test_a_share_of_a_tensor_is_all_that_is_read(tmp_path):
    save_file({"x": torch.ones(64, 1 << 18)}, tmp_path / "model.safetensors")  # 64 MiB
    found = WeightFiles(weight_files(tmp_path))
    before = resident()
    assert found.mapped("x")[3:5].sum() == 2 << 18
    assert resident() - before < 16 << 20


def resident() -> int:
    """Bytes of memory of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize(
    "content",
    ["[]", "{}", '{"weight_map": []}', '{"weight_map": {}}', '{"weight_map": {"x": 1}}', '{"weight_map": {"x": null}}'],
)
def test_an_index_that_is_none(tmp_path, content):
    (tmp_path / INDEX).write_text(content)
    with pytest.raises(UserError, match=r"has no weight_map|is not a JSON object"):
        weight_files(tmp_path)


@pytest.mark.parametrize(
    "name", ["../a.safetensors", "/etc/passwd", "", ".", "..", "sub/a.safetensors", "none", "a\0b"]
)
def test_an_index_that_names_what_is_not_in_the_folder(tmp_path, name):
    (tmp_path / "inside").mkdir()
    save_file({"x": torch.ones(1)}, tmp_path / "a.safetensors")
    (tmp_path / "inside" / INDEX).write_text(json.dumps({"weight_map": {"x": name}}))
    with pytest.raises(UserError, match="which is not in"):
        weight_files(tmp_path / "inside")


def test_damage(tmp_path):
    save(tmp_path, a={"x": torch.ones(64)}, b={"y": torch.ones(3)})
    path = tmp_path / "a.safetensors"
    whole = path.read_bytes()
    damaged = [b"", b"\0" * 8, b"\xff" * 200, os.urandom(200), whole[:-1], whole[:20], whole + b"\0", whole[1:]]
    for content in damaged:
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"a\.safetensors is damaged"):
            WeightFiles(weight_files(tmp_path))
    path.write_bytes(whole)
    assert WeightFiles(weight_files(tmp_path)).described.keys() == {"x", "y"}


def test_a_tensor_in_two_files(tmp_path):
    save(tmp_path, a={"x": torch.ones(2)}, b={"x": torch.zeros(2), "y": torch.zeros(2)})
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}))
    with pytest.raises(UserError, match=r"b\.safetensors: x is in another file"):
        WeightFiles(weight_files(tmp_path))


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int64, torch.bool, torch.float8_e4m3fn])
def test_what_is_no_floating_point_weight(tmp_path, dtype):
    save(tmp_path, a={"x": torch.ones(2).to(dtype)})
    with pytest.raises(UserError, match=r"x has type .*, which is no floating-point weight"):
        WeightFiles(weight_files(tmp_path))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_values_that_are_not_finite_are_refused_by_name(tmp_path, dtype):
    tensor = torch.ones(5, dtype=dtype)
    tensor[3] = float("nan")
    save(tmp_path, a={"x": tensor})
    with pytest.raises(UserError, match=r"a\.safetensors: x holds 1 NaN and 0 infinite values; download it again"):
        whole(tmp_path)
    save(tmp_path, a={"x": torch.full((2,), 1e300, dtype=torch.float64)})  # no number in fp32
    with pytest.raises(UserError, match="0 NaN and 2 infinite values"):
        whole(tmp_path)


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe{}", b"[" * 100_000, b'{"a": ' + b"1" * 5000 + b"}", b"5", b""])
def test_what_is_no_json_object(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(UserError, match=r"config\.json is not (JSON|a JSON object)") as caught:
        read_json(tmp_path / "config.json")
    assert len(str(caught.value)) < 400
