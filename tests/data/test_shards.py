import json
import os
import shutil

import numpy as np
import pytest

from megatron_ponder.base.errors import UserError
from megatron_ponder.data.corpus import cut_inputs
from megatron_ponder.data.inputs import find_inputs
from megatron_ponder.data.shards import ShardWriter, append_shard, make_shards, read_report
from megatron_ponder.data.token_streams import TokenStreams

U2 = np.dtype("<u2")


@pytest.fixture
def corpus(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    for name, size in (("a.txt", 10), ("b.txt", 10), ("c.txt", 50), ("e.txt", 3)):
        (folder / name).write_text("x" * size)
    (folder / "d.jsonl").write_text("\n" * 100)
    return folder


def cut(corpus, tmp_path, size=30, options=""):
    return make_shards(cut_inputs(find_inputs([corpus]), size), size, tmp_path / "work", options)


def write(shard, tokens, counts):
    shard.folder.parent.mkdir(exist_ok=True)
    writer = ShardWriter(shard, U2)
    writer.streams.add(np.array(tokens, U2), np.array(counts))
    writer.text_bytes = 7
    writer.finish({"z": 1, "a": 2}, "run")


def streams(folder):
    return TokenStreams(folder / "t", folder / "l", folder / "d", U2)


def test_ranges_are_grouped_in_order(corpus, tmp_path):
    shards = cut(corpus, tmp_path)
    names = [[os.path.basename(part.name) for part in shard.ranges] for shard in shards]
    assert names == [["a.txt", "b.txt", "c.txt"], ["d.jsonl"], ["d.jsonl"], ["d.jsonl"], ["d.jsonl", "e.txt"]]
    assert sum(shard.input_bytes for shard in shards) == 173
    assert len({shard.folder for shard in shards}) == 5


def test_a_shard_is_known_by_all_that_decides_about_it(corpus, tmp_path):
    before = [shard.folder for shard in cut(corpus, tmp_path)]
    assert before == [shard.folder for shard in cut(corpus, tmp_path)]
    assert not set(before) & {shard.folder for shard in cut(corpus, tmp_path, options="other")}
    os.utime(corpus / "b.txt", ns=(1, 1))
    assert [a == b.folder for a, b in zip(before, cut(corpus, tmp_path), strict=True)] == [
        False,
        True,
        True,
        True,
        True,
    ]
    with open(corpus / "e.txt", "a") as file:
        file.write("y")
    assert [a == b.folder for a, b in zip(before, cut(corpus, tmp_path), strict=True)] == [
        False,
        True,
        True,
        True,
        False,
    ]


def test_shards_are_joined(corpus, tmp_path):
    first, second, *_ = cut(corpus, tmp_path)
    write(first, [1, 2, 3], [2, 1])
    write(second, [], [])
    assert first.finished
    assert sorted(path.name for path in (tmp_path / "work").iterdir()) == sorted(
        [first.folder.name, second.folder.name]
    )
    joined = streams(tmp_path)
    assert append_shard(joined, first) == read_report(first)
    append_shard(joined, second)
    append_shard(joined, first)
    joined.close()
    assert (joined.num_tokens, joined.num_documents) == (6, 4)
    assert np.fromfile(tmp_path / "t", U2).tolist() == [1, 2, 3, 1, 2, 3]
    assert read_report(first).skipped == {"a": 2, "z": 1}
    assert read_report(first).text_bytes == 7


def test_the_second_to_finish_a_shard_leaves_the_first_alone(corpus, tmp_path):
    shard, *_ = cut(corpus, tmp_path)
    write(shard, [1], [1])
    inode = shard.folder.stat().st_ino
    write(shard, [1], [1])
    assert shard.folder.stat().st_ino == inode
    assert list((tmp_path / "work").iterdir()) == [shard.folder]


def test_nothing_has_the_name_of_a_shard_before_its_end(corpus, tmp_path):
    shard, *_ = cut(corpus, tmp_path)
    shard.folder.parent.mkdir()
    writer = ShardWriter(shard, U2)
    writer.streams.add(np.array([1], U2), np.array([1]))
    assert not shard.finished
    writer.discard()
    assert list((tmp_path / "work").iterdir()) == []


@pytest.mark.parametrize("name", ["tokens", "lengths", "documents", "report.json"])
@pytest.mark.parametrize("damage", ["missing", "cut", "longer"])
def test_a_damaged_shard_is_named(corpus, tmp_path, name, damage):
    shard, *_ = cut(corpus, tmp_path)
    write(shard, [1, 2, 3], [2, 1])
    path = shard.folder / name
    content = path.read_bytes()
    path.write_bytes(content[:-1] if damage == "cut" else content + b"x")
    if damage == "missing":
        path.unlink()
    joined = streams(tmp_path)
    with pytest.raises(UserError, match=rf"{shard.folder.name} is damaged; remove it and start again"):
        append_shard(joined, shard)
    joined.close()


def test_changed_tokens_are_noticed(corpus, tmp_path):
    shard, *_ = cut(corpus, tmp_path)
    write(shard, [1, 2, 3], [2, 1])
    (shard.folder / "tokens").write_bytes(np.array([1, 2, 4], U2).tobytes())
    joined = streams(tmp_path)
    with pytest.raises(UserError, match="is damaged"):
        append_shard(joined, shard)
    joined.close()
    shutil.rmtree(shard.folder)
    assert not shard.finished
    assert json.dumps(shard.input_bytes) == "70"
