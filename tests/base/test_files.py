import pytest

from megatron_ponder.base import files
from megatron_ponder.base.errors import UserError
from megatron_ponder.base.files import did_you_mean, make_folder, replacing, write_atomically


def test_a_file_is_replaced_whole(tmp_path):
    for content in (b"first", b"second, longer"):
        write_atomically(tmp_path / "file.v1", content)
        assert (tmp_path / "file.v1").read_bytes() == content
    assert [path.name for path in tmp_path.iterdir()] == ["file.v1"]


def test_a_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    write_atomically(tmp_path / "file", b"old")

    def fail(file):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "sync", fail)
    with pytest.raises(OSError, match="No space"):
        write_atomically(tmp_path / "file", b"new")
    assert (tmp_path / "file").read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_text_is_written_as_utf_8(tmp_path):
    write_atomically(tmp_path / "file", "größer")
    assert (tmp_path / "file").read_bytes() == "größer".encode()


def test_a_file_that_somebody_else_writes_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "figure.png"
    with replacing(path) as aside:
        assert aside.suffix == ".png"
        aside.write_text("old")

    def write_and_fail() -> None:
        with replacing(path) as aside:
            aside.write_text("ne")
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        write_and_fail()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_is_made_unless_a_file_is_in_the_way(tmp_path):
    make_folder(tmp_path / "a" / "b")
    make_folder(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").is_dir()
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match=f"cannot make the folder {folder}"):
            make_folder(folder)


def test_folders_below_that_could_be_meant(tmp_path):
    for name in ("b", "a", "c", "d", "e", "other"):
        (tmp_path / name).mkdir()
    (tmp_path / "file").touch()

    def named(*wanted: str) -> str:
        return did_you_mean(tmp_path, lambda folder: folder.name in wanted).replace(f"{tmp_path}/", "")

    assert named("a", "file") == "; did you mean a?"
    assert named("b", "a") == "; did you mean a, b?"
    assert named(*"abcde") == "; did you mean a, b, c or one of 2 others?"
    assert named() == did_you_mean(tmp_path / "absent", lambda folder: True) == ""
