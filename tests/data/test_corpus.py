import json

import pytest

from megatron_ponder.base.errors import UserError
from megatron_ponder.data.corpus import read_corpus
from megatron_ponder.data.inputs import find_inputs
from megatron_ponder.data.text_files import ReadingCounts, TextPart, split_name
from tests.data.test_text_files import COMPRESS


def read(*inputs, key="text"):
    tally = ReadingCounts()
    segments = list(read_corpus(find_inputs(inputs), key, tally))
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
    tally = ReadingCounts()
    documents = read_corpus(find_inputs([tmp_path]), "text", tally)
    assert next(documents) == TextPart("a", ends_document=True)
    (tmp_path / "b.txt").unlink()
    assert list(documents) == []
    assert tally.skipped == {"unreadable file": 1}


def test_no_documents_at_all(tmp_path):
    with pytest.raises(UserError, match=r"no documents in the input; give UTF-8 text or tables \(\.txt"):
        read(tmp_path)
    (tmp_path / "a.jsonl").write_text('{"body": "x"}\n\n{"body": "y"}\n')
    with pytest.raises(UserError, match=r"skipped: 2 × no text in 'text'"):
        read(tmp_path)
    (tmp_path / "b.csv").write_text("text\nx\n")
    with pytest.raises(UserError, match=r"skipped: 2 × no text in 'text'; left out of folders: 1 × \.csv\); give"):
        read(tmp_path)


@pytest.mark.parametrize(
    "name", ["a.json", "a.JSONL", "a.ndjson", "c4.json.gz", "a.Json.Bz2", "a.jsonl.XZ", "a.json.zst"]
)
@pytest.mark.parametrize("beside", [True, False])
def test_json_lines_by_any_name_are_a_document_each(tmp_path, name, beside):
    """Beside a file that is text, in whose place nothing else may be read either."""
    content = "".join(json.dumps({"text": f"document {number}"}) + "\n" for number in range(20)).encode()
    (tmp_path / name).write_bytes(COMPRESS[split_name(tmp_path / name)[1]](content))
    if beside:
        (tmp_path / "README.md").write_text("about")
    documents, skipped = read(tmp_path)
    assert (sorted(documents), skipped) == (
        sorted([f"document {number}" for number in range(20)] + ["about"] * beside),
        {},
    )
    assert len(read(tmp_path / name)[0]) == 20


def test_what_is_declared_goes_before_what_a_name_says(tmp_path):
    (tmp_path / "a.csv").write_text('{"text": "a"}\n{"text": "b"}\n')
    for declared, expected in (("lines", ["a", "b"]), ("text", ['{"text": "a"}\n{"text": "b"}\n'])):
        found = find_inputs([tmp_path], declared)
        assert [segment.text for segment in read_corpus(found, "text", ReadingCounts())] == expected
