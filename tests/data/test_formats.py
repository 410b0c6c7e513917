"""Whether JSON is lines, an array or one value is told from its beginning, however it is written."""

import gzip
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ponder.base.errors import UserError
from megatron_ponder.data.formats import HEAD_BYTES, format_of, json_layout
from megatron_ponder.data.inputs import find_inputs

MARK = b"\xef\xbb\xbf"
SCALARS = st.sampled_from([None, True, -1, 2.5, float("nan"), "", "a", '"', "\\", "{", "[\n]", "é\u2028🙂", "\ufeff"])
VALUES = SCALARS | st.lists(SCALARS, max_size=2) | st.dictionaries(st.sampled_from(["", "text", "{\n"]), SCALARS)
OBJECTS = st.dictionaries(st.sampled_from(["text", "", "}", "a\nb", "é"]), VALUES, max_size=3)
ASCII = st.booleans()


@settings(max_examples=100)
@given(
    objects=st.lists(OBJECTS, max_size=5),
    end=st.sampled_from(["\n", "\r\n", "\n\n", "\n  \n"]),
    ascii=ASCII,
    mark=st.booleans(),
    cut=st.integers(0, 200),
)
def test_objects_on_lines_are_lines(objects, end, ascii, mark, cut):
    """Also where the head ends within a line after the first."""
    lines = [json.dumps(each, ensure_ascii=ascii) for each in objects]
    content = (MARK if mark else b"") + end.join(lines).encode()
    assert json_layout(content) == "lines"
    if lines:
        first = len(MARK) + len(lines[0].encode())
        assert json_layout(content[: first + cut]) == "lines"


@settings(max_examples=100)
@given(
    objects=st.lists(OBJECTS, max_size=5),
    indent=st.sampled_from([None, 0, 1, 4, "\t"]),
    ascii=ASCII,
    before=st.sampled_from(["", "\n", "  "]),
)
def test_an_array_is_never_taken_for_lines(objects, indent, ascii, before):
    content = before + json.dumps(objects, indent=indent, ensure_ascii=ascii)
    assert json_layout(content.encode()) == "array"


@settings(max_examples=100)
@given(value=OBJECTS.filter(bool), indent=st.sampled_from([0, 1, 4, "\t"]), ascii=ASCII)
def test_an_object_over_several_lines_is_never_taken_for_lines(value, indent, ascii):
    content = json.dumps(value, indent=indent, ensure_ascii=ascii)
    assert json_layout(content.encode()) == "one value"


@settings(max_examples=100)
@given(content=st.binary(max_size=200) | st.text(alphabet='{}[]":, \n\\a1', max_size=60).map(str.encode))
def test_any_bytes_have_a_layout(content):
    assert json_layout(content) in ("lines", "array", "one value", "none")


@pytest.mark.parametrize(
    ("content", "layout"),
    [
        (b"", "lines"),
        (b"\n\n", "lines"),
        (b'{"text": "damaged\n{"text": "whole"}\n', "lines"),
        (b'{"text": "' + b"x" * HEAD_BYTES, "lines"),
        (b'[{"text": "' + b"x" * HEAD_BYTES, "array"),
        (b"[" * 100_000, "array"),
        (b'{"a": ' * 100_000, "lines"),
        (b"text\n", "none"),
        (b"7\n8\n", "none"),
    ],
)
def test_examples(content, layout):
    assert json_layout(content) == layout


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'[{"text": "a"}]', r"is one JSON array, and JSON lines are read; .* as jq -c '\.\[\]' does"),
        (b'{\n"text": "a"\n}', r"has a JSON object over several lines, .* as jq -c \. does"),
        (b"some text", "does not begin with a JSON object; give JSON lines, or say with --format text"),
        ("\ufeff{}".encode("utf-16-le"), "does not begin with a JSON object"),
    ],
)
@pytest.mark.parametrize("compressed", [False, True])
def test_json_that_is_no_lines_is_refused(tmp_path, content, message, compressed):
    path = tmp_path / ("a.json.gz" if compressed else "a.json")
    path.write_bytes(gzip.compress(content) if compressed else content)
    with pytest.raises(UserError, match=message):
        find_inputs([path])
    assert format_of(path, "text") == "text"


def test_a_damaged_file_is_counted_when_it_is_read(tmp_path):
    (tmp_path / "a.json.gz").write_bytes(gzip.compress(b'{"text": "a"}\n' * 1000)[:-20])
    assert format_of(tmp_path / "a.json.gz") == "lines"
    (tmp_path / "b.json.gz").write_bytes(b"no gzip")
    assert format_of(tmp_path / "b.json.gz") == "lines"


@pytest.mark.parametrize("name", ["a.txt", "a.md", "a.TXT.gz"])
def test_json_lines_by_the_name_of_a_text_are_refused_unless_declared(tmp_path, name):
    path = tmp_path / name
    content = b'\n{"text": "a"}\n\n{"text": "b"}\n'
    path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    with pytest.raises(UserError, match=r"JSON lines in it: rename it to \.jsonl, or say with --format"):
        format_of(path)
    assert format_of(path, "text") == "text"
    assert find_inputs([tmp_path]).left_out == {f".{name.split('.')[1].lower()} with JSON lines": 1}


def test_a_text_about_json_is_a_text(tmp_path):
    (tmp_path / "a.md").write_text('{"an": "example"}\n\nis an object.\n')
    assert format_of(tmp_path / "a.md") == "text"
