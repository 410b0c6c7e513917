import gzip
import sys

import datasets
import pyarrow
import pytest
import zstandard
from pyarrow import parquet

from megatron_ponder.base.errors import UserError
from megatron_ponder.data.corpus import cut_inputs, read_corpus, read_range
from megatron_ponder.data.inputs import find_inputs
from megatron_ponder.data.tables import row_groups
from megatron_ponder.data.text_files import ReadingCounts

TEXTS = [f"document {number} 東京 " * (number % 7) for number in range(100)]
FULL = [text for text in TEXTS if text]


def read(*inputs, key="text"):
    tally = ReadingCounts()
    return [segment.text for segment in read_corpus(find_inputs(inputs), key, tally)], tally


def read_cut(*inputs, size):
    ranges = list(cut_inputs(find_inputs(inputs), size))
    tally = ReadingCounts()
    return [segment.text for part in ranges for segment in read_range(part, "text", tally)], len(ranges)


@pytest.fixture
def table(tmp_path):
    path = tmp_path / "table" / "a.parquet"
    path.parent.mkdir()
    content = {"id": range(100), "text": TEXTS, "meta": [{"text": "no"}] * 100, "none": [None] * 100}
    parquet.write_table(pyarrow.table(content), path, row_group_size=9)
    return path


def test_a_table_is_read_whole_and_in_ranges(table):
    documents, tally = read(table)
    assert documents == FULL
    assert tally.skipped == {"empty document": len(TEXTS) - len(FULL)}
    assert tally.input_bytes == sum(row_groups(table))
    assert len(row_groups(table)) == 12
    assert read_cut(table, size=1) == (FULL, 12)
    assert read_cut(table, size=3 * row_groups(table)[0])[1] in (4, 5)


@pytest.mark.parametrize(("suffix", "compress"), [(".gz", gzip.compress), (".zst", zstandard.compress)])
def test_a_compressed_table(table, suffix, compress):
    content = compress(table.read_bytes())
    path = table.with_name(f"a.parquet{suffix}")
    path.write_bytes(content)
    documents, tally = read(path)
    assert documents == FULL
    assert tally.input_bytes == len(content)


@pytest.mark.parametrize(("key", "rows"), [("id", 100), ("none", 100), ("meta", 100), ("other", 100)])
def test_a_column_without_text(table, key, rows):
    with pytest.raises(UserError, match=rf"skipped: {rows} × no text in '{key}'.* another --key"):
        read(table, key=key)


def test_damage_is_counted_and_never_other_text(table):
    whole = table.read_bytes()
    path = table.with_name("z.parquet")
    other = table.with_name("b.txt")
    other.write_text("b")
    for size in (0, 5, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        documents, tally = read(path, other)
        assert documents == ["b"]
        assert sum(tally.skipped.values()) == 1


def test_a_string_that_is_not_utf8(tmp_path):
    column = pyarrow.array([b"good", b"bad \xff", b"fine"]).view(pyarrow.string())
    parquet.write_table(pyarrow.table({"text": column}), tmp_path / "a.parquet")
    documents, tally = read(tmp_path / "a.parquet")
    assert documents == ["good", "fine"]
    assert tally.skipped == {"not UTF-8": 1}


def test_a_saved_dataset_is_read_whole_and_in_ranges(tmp_path):
    dataset = datasets.Dataset.from_dict({"text": TEXTS, "id": list(range(100))})
    dataset.save_to_disk(tmp_path / "plain")
    dataset.select(range(99, -1, -1)).save_to_disk(tmp_path / "mapped")
    documents, tally = read(tmp_path / "plain")
    assert documents == FULL
    assert tally.skipped == {"empty document": len(TEXTS) - len(FULL)}
    assert tally.input_bytes > 0
    assert read(tmp_path / "mapped")[0] == FULL[::-1]
    assert read_cut(tmp_path / "plain", size=tally.input_bytes // 10) == (FULL, 10)
    with pytest.raises(UserError, match="100 × no text in 'id'"):
        read(tmp_path / "plain", key="id")
    with pytest.raises(UserError, match="100 × no text in 'other'"):
        read(tmp_path / "plain", key="other")


def test_a_saved_dataset_of_several_parts(tmp_path):
    part = datasets.Dataset.from_dict({"text": TEXTS})
    datasets.DatasetDict({"train": part, "test": part}).save_to_disk(tmp_path / "parts")
    with pytest.raises(UserError, match=r"give the folder of one of them \(test, train\)"):
        read(tmp_path / "parts")
    assert read(tmp_path / "parts" / "test")[0] == FULL


def test_a_damaged_saved_dataset(tmp_path):
    datasets.Dataset.from_dict({"text": TEXTS}).save_to_disk(tmp_path / "saved")
    (tmp_path / "saved" / "state.json").write_text("{}")
    with pytest.raises(UserError, match=r"saved is not a whole saved dataset \(.*save it again"):
        read(tmp_path / "saved")


def test_the_hub(tmp_path, monkeypatch):
    asked = []

    def load(name, split):
        asked.append((name, split))
        if name == "owner/missing":
            raise ConnectionError("no\nnetwork")
        return datasets.load_from_disk(tmp_path / "saved")

    datasets.Dataset.from_dict({"text": TEXTS}).save_to_disk(tmp_path / "saved")
    monkeypatch.setattr(datasets, "load_dataset", load)
    assert read("hf://owner/name")[0] == FULL
    assert read("hf://owner/name:test[:50%]")[0] == FULL
    assert asked == [("owner/name", "train"), ("owner/name", "test[:50%]")]
    with pytest.raises(UserError, match=r"hf://owner/missing cannot be had .*\(no\); check the name and the network"):
        read("hf://owner/missing")


@pytest.mark.parametrize(
    ("package", "name"), [("pyarrow", "a.parquet"), ("datasets", "saved"), ("datasets", "hf://owner/unseen")]
)
def test_without_a_package(tmp_path, monkeypatch, package, name):
    (tmp_path / "a.parquet").touch()
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "state.json").touch()
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=rf"need.? {package} to be read: pip install 'megatron_ponder\[data\]'"):
        read(name if name.startswith("hf://") else tmp_path / name)
