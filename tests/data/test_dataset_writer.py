"""One process at a time writes a dataset; what it writes is in test_indexed_dataset.py."""

from pathlib import Path

import numpy as np
import pytest

from megatron_ponder.base.errors import UserError
from megatron_ponder.data.dataset_writer import IndexedDatasetWriter
from megatron_ponder.data.indexed_dataset import IndexedDataset


def write(prefix: Path, tokens: list[int], lose_the_right: bool = False) -> None:
    with IndexedDatasetWriter(prefix, np.dtype("<u2")) as writer:
        writer.add_document(tokens)
        if lose_the_right:
            Path(f"{prefix}.claim").unlink()


def test_a_second_writer_is_refused_and_the_first_goes_on(tmp_path):
    with IndexedDatasetWriter(tmp_path / "data", np.dtype("<u2")) as writer:
        writer.add_document([1, 2])
        with pytest.raises(UserError, match=r"the dataset .*data is in use by process .* another --output-prefix"):
            write(tmp_path / "data", [3])
        writer.add_document([4])
    assert [IndexedDataset(tmp_path / "data").read(number).tolist() for number in (0, 1)] == [[1, 2], [4]]
    write(tmp_path / "data", [5])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data.bin", "data.idx"]


def test_the_right_is_asked_for_again_before_anything_is_replaced(tmp_path):
    write(tmp_path / "data", [1, 2])
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(UserError, match=r"not held by this process any more: .*\.claim is gone"):
        write(tmp_path / "data", [3], lose_the_right=True)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_nobody_has_the_right_after_a_failure_to_begin(tmp_path):
    (tmp_path / "data.bin.partial").mkdir()
    with pytest.raises(IsADirectoryError):
        write(tmp_path / "data", [1])
    assert [path.name for path in tmp_path.iterdir()] == ["data.bin.partial"]
