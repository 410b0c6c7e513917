import bz2
import gzip
import itertools
import json
import lzma

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ponder.base.errors import UserError
from megatron_ponder.data import text_files
from megatron_ponder.data.text_files import ReadingCounts, json_lines, open_input, split_name, whole_text

COMPRESS = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstandard.compress,
}


def text_of(path):
    tally = ReadingCounts()
    segments = list(whole_text(path, tally))
    assert [segment.ends_document for segment in segments] == [False] * (len(segments) - 1) + [True] * bool(segments)
    return "".join(segment.text for segment in segments), tally


def lines_of(path, start=0, stop=None):
    tally = ReadingCounts()
    return [segment.text for segment in json_lines(path, "text", start, stop, tally)], tally


@pytest.mark.parametrize("compression", COMPRESS)
@pytest.mark.parametrize("block", [1 << 22, 7, 1])
def test_text_comes_through_compression_and_in_parts(tmp_path, monkeypatch, compression, block):
    monkeypatch.setattr(text_files, "BLOCK_BYTES", block)
    text = " first\r\n\n\tsecond é 東京 🙂\n" * 5
    path = tmp_path / f"a.txt{compression}"
    content = COMPRESS[compression](b"\xef\xbb\xbf" + text.encode())
    path.write_bytes(content)
    found, tally = text_of(path)
    assert found == text
    assert (tally.skipped, tally.input_bytes) == ({}, len(content))


@pytest.mark.parametrize("compression", COMPRESS)
@pytest.mark.parametrize("block", [1 << 22, 16])
@pytest.mark.parametrize(
    ("content", "reason"), [(b"x" * 100 + b"\xff", "not UTF-8"), (b"x" * 100 + "é".encode()[:1], "not UTF-8")]
)
def test_nothing_of_a_file_that_is_not_utf8_is_used(tmp_path, monkeypatch, compression, block, content, reason):
    monkeypatch.setattr(text_files, "BLOCK_BYTES", block)
    (tmp_path / f"a.txt{compression}").write_bytes(COMPRESS[compression](content))
    found, tally = text_of(tmp_path / f"a.txt{compression}")
    assert (found, tally.skipped) == ("", {reason: 1})


@pytest.mark.parametrize("compression", [".gz", ".bz2", ".xz", ".zst"])
@pytest.mark.parametrize("block", [1 << 22, 64])
def test_every_truncation_of_a_compressed_file_is_counted(tmp_path, monkeypatch, compression, block):
    monkeypatch.setattr(text_files, "BLOCK_BYTES", block)
    text = "".join(f"{number * 7919 % 1000} " for number in range(200))
    whole = COMPRESS[compression](text.encode())
    path = tmp_path / f"a.txt{compression}"
    for size in range(1, len(whole)):
        path.write_bytes(whole[:size])
        found, tally = text_of(path)
        assert (found, tally.skipped) == ("", {"damaged compressed file": 1}), size
    lines = tmp_path / f"a.jsonl{compression}"
    content = COMPRESS[compression]("".join(json.dumps({"text": str(n)}) + "\n" for n in range(500)).encode())
    lines.write_bytes(content[:-8])
    found, tally = lines_of(lines)
    assert found == [str(n) for n in range(len(found))]
    assert tally.skipped == {"damaged compressed file": 1}


@pytest.mark.parametrize("compression", [".gz", ".bz2", ".xz", ".zst"])
def test_damage_inside_never_passes_for_other_text(tmp_path, compression):
    text = "".join(f"{number * 7919 % 1000} " for number in range(100))
    # Zstandard has a checksum only where its writer asked for one.
    compress = zstandard.ZstdCompressor(write_checksum=True).compress if compression == ".zst" else gzip.compress
    whole = compress(text.encode())
    path = tmp_path / f"a.txt{compression}"
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x55]) + whole[place + 1 :])
        found, tally = text_of(path)
        assert found in ("", text)
        assert bool(found) != bool(tally.skipped)


@pytest.mark.parametrize("compression", [".gz", ".bz2", ".xz", ".zst"])
def test_files_that_were_joined(tmp_path, compression):
    parts = [json.dumps({"text": f"part {number}"}).encode() + b"\n" for number in range(3)]
    path = tmp_path / f"a.jsonl{compression}"
    path.write_bytes(b"".join(map(COMPRESS[compression], parts)))
    assert lines_of(path)[0] == ["part 0", "part 1", "part 2"]


@settings(max_examples=200)
@given(
    lines=st.lists(st.sampled_from([b"", b"  ", b'{"text": "a"}', b'{"text": "longer \\n"}\r', b"bad", b"{}"])),
    last_newline=st.booleans(),
    mark=st.booleans(),
    cuts=st.lists(st.integers(0, 200)),
)
def test_ranges_of_a_file_have_each_line_once(tmp_path_factory, lines, last_newline, mark, cuts):
    content = b"\n".join(lines) + (b"\n" if last_newline else b"")
    content = (b"\xef\xbb\xbf" if mark else b"") + content
    path = tmp_path_factory.getbasetemp() / "ranges.jsonl"
    path.write_bytes(content)
    documents, whole = lines_of(path)
    bounds = [0, *sorted(cut for cut in cuts if cut < len(content)), len(content)]
    found, skipped = [], ReadingCounts().skipped
    for start, stop in itertools.pairwise(bounds):
        part, tally = lines_of(path, start, stop)
        found += part
        skipped += tally.skipped
    assert (found, skipped) == (documents, whole.skipped)
    assert whole.input_bytes == len(content)


def test_a_line_without_end_is_not_held(tmp_path, monkeypatch):
    monkeypatch.setattr(text_files, "LONGEST_LINE", 1 << 20)
    path = tmp_path / "a.jsonl"
    fitting = b'{"text": "' + b"x" * ((1 << 20) - 13) + b'"}'
    assert len(fitting) == (1 << 20) - 1
    path.write_bytes(fitting + b"\n" + b'{"text": "' + b"y" * (3 << 20) + b'"}\n{"text": "after"}')
    documents, tally = lines_of(path)
    assert [len(document) for document in documents] == [(1 << 20) - 13, 5]
    assert tally.skipped == {"line over 1 MiB": 1}


def test_a_file_that_changes_while_it_is_read_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(text_files, "BLOCK_BYTES", 1 << 16)
    path = tmp_path / "a.txt"
    path.write_bytes(b"x" * (1 << 20))
    segments = whole_text(path, ReadingCounts())
    next(segments)
    path.write_bytes(b"\xff" * (1 << 20))
    with pytest.raises(UserError, match=r"a\.txt changed while it was read"):
        list(segments)


def test_without_zstandard(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "zstandard", None)
    (tmp_path / "a.txt.zst").write_bytes(b"")
    with pytest.raises(UserError, match=r"a\.txt\.zst needs zstandard .* pip install 'megatron_ponder\[data\]'"):
        text_of(tmp_path / "a.txt.zst")


def test_names(tmp_path):
    assert [split_name(tmp_path / name) for name in ("a.jsonl.gz", "A.TXT", "b.c.parquet.ZST", "gz", "x.gz")] == [
        (".jsonl", ".gz"),
        (".txt", ""),
        (".parquet", ".zst"),
        ("", ""),
        ("", ".gz"),
    ]
    (tmp_path / "a").write_bytes(b"abc")
    with open_input(tmp_path / "a") as file:
        assert list(file.blocks()) == [b"abc"]
