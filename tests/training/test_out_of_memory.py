"""A GPU whose memory is full: one line that says what to change, and a file that says what lay in it."""

from pathlib import Path

import pytest
import torch

from megatron_ponder.base.errors import UserError
from megatron_ponder.training.out_of_memory import out_of_memory_explained

FULL = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.1 GiB.")


def run_full(folder: Path) -> None:
    with out_of_memory_explained(folder, rank=3):
        raise FULL


def test_what_lay_in_memory_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", lambda path: Path(path).write_bytes(b"blocks"))
    with pytest.raises(UserError) as raised:
        run_full(tmp_path / "profile")
    file = tmp_path / "profile" / "rank_3_out_of_memory.pickle"
    assert file.read_bytes() == b"blocks"
    assert str(raised.value) == (
        f"rank 3: CUDA out of memory. Tried to allocate 2.00 GiB; what lay in it is in {file}, for "
        "pytorch.org/memory_viz; lower training.micro_batch_size, set training.recompute to block, raise "
        "parallel.zero_stage, or use more ranks"
    )


def test_a_full_disk_hides_no_full_memory(tmp_path, monkeypatch):
    def fail(path: str) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", fail)
    with pytest.raises(UserError, match=r"could not be written \(.*No space left.*micro_batch_size"):
        run_full(tmp_path)


def test_other_errors_pass():
    with pytest.raises(RuntimeError, match="other"), out_of_memory_explained(Path("none"), rank=0):
        raise RuntimeError("other")
