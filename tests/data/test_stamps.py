"""What was found in a file is asked again exactly when somebody may have written to the file."""

import os
import shutil
import time
from contextlib import ExitStack

import pytest

from megatron_ponder.data import stamps
from megatron_ponder.data.stamps import Stamps


@pytest.fixture
def path(tmp_path, monkeypatch):
    """A file whose stamps count at once, and whose next change will have another time."""
    monkeypatch.setattr(stamps, "SECONDS_UNTIL_SETTLED", 0)
    path = tmp_path / "file"
    path.write_bytes(b"content")
    time.sleep(0.05)
    return path


def ask(folder, *paths, what="question"):
    """The answer, and whether the files were read for it."""
    asked = []

    def read():
        asked.append(what)
        return b" ".join(file.read() for file in files).decode()

    with ExitStack() as stack:
        files = [stack.enter_context(open(path, "rb")) for path in paths]
        return Stamps(folder).once(what, files, read), bool(asked)


def test_files_are_read_once(path, tmp_path):
    folder = tmp_path / "new" / "stamps"
    assert ask(folder, path) == ("content", True)
    assert ask(folder, path) == ("content", False)
    assert ask(folder, path, what="other question") == ("content", True)
    assert ask(folder, path, path) == ("content content", True)
    assert [other.suffix for other in folder.iterdir()] == [".stamp"] * 3


def write_in_place(path):
    with open(path, "r+b") as file:
        file.write(b"CONTENT")


def write_and_put_the_time_back(path):
    before = path.stat()
    write_in_place(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def replace(path):
    other = path.with_name("other")
    other.write_bytes(b"CONTENT")
    os.replace(other, path)


def copy_over_with_its_times(path):
    other = path.with_name("other")
    other.write_bytes(b"CONTENT")
    os.utime(other, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns))
    shutil.copy2(other, path)


@pytest.mark.parametrize("change", [write_in_place, write_and_put_the_time_back, replace, copy_over_with_its_times])
def test_every_way_to_change_a_file_is_noticed(path, tmp_path, change):
    folder = tmp_path / "stamps"
    ask(folder, path)
    change(path)
    assert ask(folder, path) == ("CONTENT", True)


def test_after_another_start_of_the_machine_all_is_read_again(path, tmp_path, monkeypatch):
    ask(tmp_path / "stamps", path)
    (tmp_path / "boot").write_text("another")
    monkeypatch.setattr(stamps, "BOOT_ID", tmp_path / "boot")
    assert ask(tmp_path / "stamps", path) == ("content", True)
    monkeypatch.setattr(stamps, "BOOT_ID", tmp_path / "no such file")
    assert [ask(tmp_path / "stamps", path)[1] for _ in range(2)] == [True, True]


def test_what_changed_a_moment_ago_is_not_remembered(path, tmp_path, monkeypatch):
    monkeypatch.setattr(stamps, "SECONDS_UNTIL_SETTLED", 60)
    assert [ask(tmp_path / "stamps", path)[1] for _ in range(2)] == [True, True]
    assert not (tmp_path / "stamps").exists()


def test_what_changed_while_it_was_read_is_not_remembered_as_it_is_now(path, tmp_path):
    folder = tmp_path / "stamps"
    with open(path, "rb") as file:
        assert Stamps(folder).once("question", [file], lambda: (file.read().decode(), write_in_place(path))[0])
    assert ask(folder, path) == ("CONTENT", True)


def test_what_was_not_found_is_not_remembered(path, tmp_path):
    with open(path, "rb") as file:
        assert Stamps(tmp_path / "stamps").once("question", [file], lambda: None) is None
    assert ask(tmp_path / "stamps", path) == ("content", True)


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b'{"state": 1, "found": "wrong"}', b"\xff"])
def test_a_damaged_stamp_is_none(path, tmp_path, content):
    ask(tmp_path / "stamps", path)
    (stamp,) = (tmp_path / "stamps").iterdir()
    stamp.write_bytes(content)
    assert ask(tmp_path / "stamps", path) == ("content", True)
    assert ask(tmp_path / "stamps", path) == ("content", False)


def test_a_folder_that_cannot_be_written_does_no_harm(path):
    assert [ask(path / "below", path) for _ in range(2)] == [("content", True)] * 2
