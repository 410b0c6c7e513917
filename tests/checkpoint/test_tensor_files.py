"""Files of tensors: readable by the library, and checksums of what was written."""

import hashlib

import torch
from safetensors.torch import load_file, save_file

from megatron_ponder.checkpoint.tensor_files import CHUNK, problem_of, write_tensors


def test_files_are_those_of_the_library(tmp_path):
    """The library reads what is written here, of every shape and longer than one piece, as it reads its own."""
    tensors = {
        "weight/long": torch.randn(3, CHUNK // 4 + 5),
        'weight/ü"': torch.randn(4, 6).T,
        "exp_avg/scalar": torch.tensor(float("nan")),
        "exp_avg/empty": torch.zeros(0, 3),
    }
    size, digest = write_tensors(tmp_path, "a", tensors)
    content = (tmp_path / "a").read_bytes()
    assert (size, digest) == (len(content), hashlib.sha256(content).hexdigest())
    assert int.from_bytes(content[:8], "little") % 8 == 0
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, tmp_path / "b")
    ours, theirs = load_file(tmp_path / "a"), load_file(tmp_path / "b")
    assert ours.keys() == theirs.keys() == tensors.keys()
    for key, tensor in theirs.items():
        assert ours[key].shape == tensor.shape
        assert torch.equal(ours[key].view(-1).view(torch.int32), tensor.view(-1).view(torch.int32))
    write_tensors(tmp_path, "c", {})
    assert load_file(tmp_path / "c") == {}


def test_a_file_is_compared_with_what_was_written(tmp_path):
    path = tmp_path / "a"
    size, digest = write_tensors(tmp_path, "a", {"weight/a": torch.ones(2 * CHUNK // 4)})
    read: list[int] = []
    assert problem_of(path, size, digest, read.append) is None
    assert (sum(read), len(read)) == (size, 3)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert problem_of(path, size, digest) == "is damaged (its checksum differs)"
    assert problem_of(path, size, None) is None
    assert problem_of(path, size + 1, None) == f"has {size} bytes where {size + 1} were written"
    assert problem_of(tmp_path / "b", size, digest) == "is missing"
