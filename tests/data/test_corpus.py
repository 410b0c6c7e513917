import json
from pathlib import Path

import pytest

from megatron_ponder.data.corpus import find_inputs, read_corpus
from megatron_ponder.data.text_files import Segment, Tally
from megatron_ponder.errors import UserError


def read(*inputs, key="text"):
    tally = Tally()
    segments = list(read_corpus(inputs, key, tally))
    assert all(segment.ends_document for segment in segments)
    return [segment.text for segment in segments], tally.skipped


def test_a_plain_file_is_one_document_to_the_byte(tmp_path):
    text = " first\r\n\n\tsecond é\n"
    (tmp_path / "a.txt").write_bytes(text.encode())
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert read(tmp_path / "a.txt", tmp_path / "b.txt") == ([text, text], {})


def test_each_json_line_is_a_document(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "one\\ntwo"}\n\n{"text": "three", "id": 1}\r\n{"text": "\\ud83d\\ude42"}')
    assert read(path) == (["one\ntwo", "three", "🙂"], {})


def test_another_key(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "no", "body": "yes"}))
    assert read(tmp_path / "a.jsonl", key="body")[0] == ["yes"]


def test_unusable_input_is_counted(tmp_path):
    no_text = [b'{"text": 3}', b'{"text": ["x"]}', b'{"other": "x"}', b'["text"]', b"7", b"null"]
    bad_json = [b'{"text": "cut', b"[" * 100_000]
    lines = [b'{"text": "good"}', b'{"text": ""}', b'{"text": "\\ud800"}', b'{"text": "\xff"}', *no_text, *bad_json]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    (tmp_path / "b.txt").write_bytes(b"latin \xe9")
    (tmp_path / "c.txt").write_bytes(b"")
    documents, skipped = read(tmp_path)
    assert documents == ["good"]
    assert skipped == {
        "malformed JSON": 2,
        "empty document": 2,
        "no text in 'text'": 6,
        "half a surrogate pair": 1,
        "not UTF-8": 2,
    }


def test_a_file_that_vanishes_is_counted(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "b.txt").write_text("b")
    tally = Tally()
    documents = read_corpus([tmp_path], "text", tally)
    assert next(documents) == Segment("a", ends_document=True)
    (tmp_path / "b.txt").unlink()
    assert list(documents) == []
    assert tally.skipped == {"unreadable file": 1}


def test_folders_and_patterns_are_sorted_and_files_come_once(tmp_path):
    for name in ("b.txt", "a.md", "deep/er/c.py", "deep/d.rst", "e.jsonl", "ignored.bin", "deep/no_suffix"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("{}")
    names = lambda *inputs: [Path(path).relative_to(tmp_path).as_posix() for path in find_inputs(inputs)]
    everything = ["a.md", "b.txt", "deep/d.rst", "deep/er/c.py", "e.jsonl"]
    assert names(tmp_path) == everything
    assert names(tmp_path / "b.txt", tmp_path) == ["b.txt", "a.md", *everything[2:]]
    assert names(str(tmp_path / "*.[tm]*")) == ["a.md", "b.txt"]
    assert names(str(tmp_path / "dee*")) == ["deep/d.rst", "deep/er/c.py"]
    assert names(tmp_path / "ignored.bin") == ["ignored.bin"]


@pytest.mark.parametrize("name", ["missing", "*.txt"])
def test_input_that_does_not_exist(tmp_path, name):
    with pytest.raises(UserError, match="matches no file: check --input"):
        read(tmp_path / name)


def test_no_documents_at_all(tmp_path):
    with pytest.raises(UserError, match=r"no documents in the input: give UTF-8 text or tables \(\.txt"):
        read(tmp_path)
    (tmp_path / "a.jsonl").write_text('{"body": "x"}\n\n{"body": "y"}\n')
    with pytest.raises(UserError, match=r"skipped: 2 × no text in 'text'"):
        read(tmp_path)
