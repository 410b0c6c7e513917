"""Text is read in one way, and what is no text, or no file, is refused in one line."""

import io
import os
import socket

import pytest

from megatron_ponder.base.errors import UserError
from megatron_ponder.base.texts import check_text, decode, read_content, read_text

TEXT = " first\r\n\n\tsecond é 東京 🙂\n"


def test_a_byte_order_mark_is_no_text_and_line_ends_are(tmp_path):
    for name, mark in (("a", b""), ("b", b"\xef\xbb\xbf")):
        (tmp_path / name).write_bytes(mark + TEXT.encode())
        assert read_text(tmp_path / name) == TEXT


def test_only_the_first_mark_is_one():
    assert decode(b"\xef\xbb\xbfa\xef\xbb\xbfb", "x") == "a\ufeffb"


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be"])
def test_utf16_is_refused_by_name(encoding):
    content = "\ufeffabc".encode(encoding)
    with pytest.raises(UserError, match=r"^a.txt is UTF-16 text: convert it to UTF-8, as iconv -f UTF-16 -t UTF-8"):
        decode(content, "a.txt")


def test_other_bytes_are_refused_with_their_place(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"latin \xe9")
    with pytest.raises(UserError, match=r"a\.txt is not UTF-8 text \(unexpected end of data at byte 6\): convert it"):
        read_text(tmp_path / "a.txt")


@pytest.mark.parametrize("kind", ["pipe", "device", "socket", "folder"])
def test_what_is_no_file_is_not_waited_for(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)  # names of sockets are short
    paths = {"pipe": "a", "device": "/dev/zero", "socket": "a", "folder": tmp_path}
    with socket.socket(socket.AF_UNIX) as opened:
        if kind == "pipe":
            os.mkfifo("a")
        if kind == "socket":
            opened.bind("a")
        with pytest.raises(UserError, match=rf"^{paths[kind]} is a {kind}: "):
            read_text(paths[kind])


def test_a_file_that_is_missing():
    with pytest.raises(FileNotFoundError):
        read_text("missing")


@pytest.mark.parametrize(("device", "ends"), [("/dev/null", True), ("/dev/zero", False)])
def test_a_device_as_standard_input(monkeypatch, device, ends):
    with open(device, encoding="utf-8") as file:
        monkeypatch.setattr("sys.stdin", file)
        if ends:
            assert read_content("-") == b""
        else:
            with pytest.raises(UserError, match="standard input is a device: give it a file or a pipe"):
                read_content("-")


def test_standard_input_that_is_closed(monkeypatch):
    for stream in (None, io.TextIOWrapper(io.BytesIO())):
        monkeypatch.setattr("sys.stdin", stream)
        if stream is not None:
            stream.close()
        with pytest.raises(UserError, match="standard input is closed"):
            read_text("-")


def test_standard_input_without_its_mark(monkeypatch):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\xef\xbb\xbf" + TEXT.encode())))
    assert read_text("-") == TEXT


@pytest.mark.parametrize("value", ["a\ud800b", {"a": ["\ud800"]}, {"\ud800": 1}, [[["x", "\ud800"]]]])
def test_half_a_pair_is_found_wherever_it_is(value):
    with pytest.raises(UserError, match=r"^line 3 has half a surrogate pair \(\\ud800\), which is no character"):
        check_text(value, "line 3")


@pytest.mark.parametrize("value", ["🙂é\n", None, {"a": [1, 2.5, True, float("nan")]}, []])
def test_all_else_is_text(value):
    check_text(value, "line 3")
