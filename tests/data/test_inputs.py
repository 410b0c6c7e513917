"""What inputs name, what folders and links lead to, and what is left out of it in words."""

import json
import os
from pathlib import Path

import pytest

from megatron_ponder.base.errors import UserError
from megatron_ponder.data.inputs import find_inputs


@pytest.fixture
def names(tmp_path):
    """The files that inputs name, below the folder of the test."""
    return lambda *inputs: [Path(path).relative_to(tmp_path).as_posix() for path in find_inputs(inputs).formats]


@pytest.fixture
def write(tmp_path):
    """Writes files by their names."""

    def write(*paths: str) -> None:
        for path in paths:
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / path).write_text("{}")

    return write


def test_folders_and_patterns_are_sorted_and_files_come_once(tmp_path, names, write):
    write("b.txt", "a.md", "deep/er/c.py", "deep/d.rst", "e.jsonl", "ignored.bin", "deep/no_suffix")
    everything = ["a.md", "b.txt", "deep/d.rst", "deep/er/c.py", "e.jsonl"]
    assert names(tmp_path) == everything
    assert names(tmp_path / "b.txt", tmp_path) == ["b.txt", "a.md", *everything[2:]]
    assert names(str(tmp_path / "*.[tm]*")) == ["a.md", "b.txt"]
    assert names(str(tmp_path / "dee*")) == ["deep/d.rst", "deep/er/c.py"]


@pytest.mark.parametrize("name", ["missing", "*.txt"])
def test_input_that_does_not_exist(tmp_path, name):
    with pytest.raises(UserError, match="matches no file; check --input"):
        find_inputs([tmp_path / name])


def test_a_named_link_to_nothing(tmp_path):
    (tmp_path / "a.txt").symlink_to("missing")
    with pytest.raises(FileNotFoundError):
        find_inputs([tmp_path / "a.txt"])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("a.csv", "is a table, and which of its columns is text .* as Parquet or as JSON lines; with --format text"),
        ("a.TSV.gz", "is a table"),
        ("a.bin", r"has no ending that says what it is \(\.txt, .*: rename it, or say it with --format text, lines or"),
        ("no_suffix", "has no ending that says what it is"),
        ("a.gz", "has no ending that says what it is"),
    ],
)
@pytest.mark.parametrize("pattern", [False, True])
def test_a_named_file_of_another_kind_is_refused(tmp_path, write, name, message, pattern):
    write(name, "b.txt")
    with pytest.raises(UserError, match=message):
        find_inputs([tmp_path / ("*" if pattern else name)])
    assert list(find_inputs([tmp_path / name], "text").formats.values()) == ["text"]


def test_a_folder_says_what_it_leaves_out(tmp_path, names, write):
    write("a.txt", "b.csv", "c.CSV", "deep/d.bin.gz", "Makefile")
    (tmp_path / "array.json").write_text(json.dumps([{"text": "a"}, {"text": "b"}]))
    (tmp_path / "config.json").write_text(json.dumps({"a": 1, "b": 2}, indent=2))
    (tmp_path / "gone.txt").symlink_to("missing")
    (tmp_path / "circle.txt").symlink_to("circle.txt")
    os.mkfifo(tmp_path / "pipe.txt")
    assert names(tmp_path) == ["a.txt"]
    found = find_inputs([tmp_path])
    assert found.describe_left_out() == (
        "left out of folders: 1 × .bin, 2 × .csv, 1 × .json over several lines, 1 × .json with an array, "
        "1 × dangling link, 1 × link in a circle, 1 × pipe, socket or device, 1 × without an ending"
    )
    declared = find_inputs([tmp_path], "text")
    assert len(declared.formats) == 7
    assert sum(declared.left_out.values()) == 3


def test_links_to_folders_are_followed_and_circles_end(tmp_path, names, write):
    write("in/a.txt", "in/deep/b.txt", "elsewhere/c.txt", "elsewhere/more/d.txt")
    (tmp_path / "in" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "in" / "deep" / "up").symlink_to("..")
    (tmp_path / "elsewhere" / "self").symlink_to(".")
    (tmp_path / "in" / "zz_again").symlink_to(tmp_path / "elsewhere" / "more")
    (tmp_path / "in" / "one.txt").symlink_to(tmp_path / "elsewhere" / "c.txt")
    assert names(tmp_path / "in") == [
        "in/a.txt",
        "in/deep/b.txt",
        "in/linked/c.txt",
        "in/linked/more/d.txt",
        "in/one.txt",
    ]
    assert find_inputs([tmp_path / "in"]).left_out == {"folder that is read by another name": 3}


@pytest.mark.parametrize(("path", "kind"), [("/dev/zero", "device"), ("pipe", "pipe")])
def test_what_is_no_file_is_not_waited_for(tmp_path, path, kind):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match=f"is a {kind}: write what it gives to a file"):
        find_inputs([tmp_path / path], "text")


def test_a_name_that_is_not_utf8(tmp_path, names):
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.txt")).write_text("a")
    assert names(tmp_path) == ["caf\udce9.txt"]


def test_texts_beside_tables_are_said(tmp_path, write):
    write("in/c4.jsonl", "in/README.md", "in/other/LICENSE.txt.gz", "texts/a.md", "tables/a.jsonl")
    assert find_inputs([tmp_path / "in"]).warnings() == [
        "read as texts beside tables: 1 × .md, 1 × .txt; name the files to have only the others"
    ]
    for alone in ("texts", "tables"):
        assert find_inputs([tmp_path / alone]).warnings() == []
