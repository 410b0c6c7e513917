"""What commands print and return when something cannot work."""

import errno

import pytest

from megatron_ponder.base.errors import UserError, command, describe


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    for name in ("RANK", "SLURM_PROCID", "PONDER_TRACEBACK"):
        monkeypatch.delenv(name, raising=False)


def fail(error: Exception) -> None:
    """Run a command that raises an error."""

    @command
    def failing(argv) -> None:
        raise error

    failing([])


def printed(capsys, error: Exception) -> str:
    """What a failing command prints on stderr, after checking how it ends."""
    with pytest.raises(SystemExit) as caught:
        fail(error)
    assert caught.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    return err


def shared(message: str) -> UserError:
    error = UserError(message)
    error.shared = True
    return error


def test_a_user_error_is_one_line(capsys):
    assert printed(capsys, UserError("set model.x\n   to 3")) == "error: set model.x to 3\n"


def test_success_returns_quietly(capsys):
    seen = []
    command(seen.append)(["--a", "b"])
    assert seen == [["--a", "b"]]
    assert capsys.readouterr() == ("", "")


def test_a_bug_keeps_its_traceback():
    with pytest.raises(KeyError):
        fail(KeyError("a bug"))
    with pytest.raises(ValueError, match="not for users"):
        fail(ValueError("not for users"))


def test_traceback_on_request(monkeypatch):
    monkeypatch.setenv("PONDER_TRACEBACK", "1")
    with pytest.raises(UserError):
        fail(UserError("x"))


@pytest.mark.parametrize("variable", ["RANK", "SLURM_PROCID"])
def test_only_the_first_rank_reports_a_shared_error(capsys, monkeypatch, variable):
    monkeypatch.setenv(variable, "2")
    assert printed(capsys, UserError("mine alone")) == "rank 2: error: mine alone\n"
    assert printed(capsys, shared("everyone's")) == ""
    monkeypatch.setenv(variable, "0")
    assert printed(capsys, shared("everyone's")) == "error: everyone's\n"


@pytest.mark.parametrize("value", ["", " ", "five", "-1", "tcp://10.0.0.1:1", "²", "9" * 5000])
def test_a_rank_that_is_no_number_does_not_hide_the_error(capsys, monkeypatch, value):
    monkeypatch.setenv("RANK", value)
    assert printed(capsys, UserError("the cause")) == "error: the cause\n"
    monkeypatch.setenv("SLURM_PROCID", "2")
    assert printed(capsys, UserError("the cause")) == "rank 2: error: the cause\n"


def test_errors_of_the_system_name_the_file_and_a_remedy(capsys, tmp_path):
    with pytest.raises(FileNotFoundError) as missing:
        (tmp_path / "absent").read_text()
    assert (
        printed(capsys, missing.value) == f"error: No such file or directory ({tmp_path / 'absent'}); check the path\n"
    )
    full = OSError(errno.ENOSPC, "No space left on device", "runs/a")
    assert describe(full) == "No space left on device (runs/a); free some space or choose another folder"
    denied = PermissionError(errno.EACCES, "Permission denied", "runs/a")
    assert describe(denied).startswith("Permission denied (runs/a); choose a folder that you may write to")
    assert "writable file system" in describe(OSError(errno.EROFS, "Read-only file system", "runs/a"))
    assert describe(OSError(errno.EIO, "Input/output error")) == "Input/output error"
    assert describe(OSError("plain words")) == "plain words"


def test_the_decorated_command_keeps_its_name():
    decorated = command(fail)
    assert (decorated.__name__, decorated.__doc__) == ("fail", "Run a command that raises an error.")


@pytest.mark.parametrize("given", [True, False])
def test_a_command_line_that_is_no_text_is_refused_before_any_work(capsys, monkeypatch, given):
    """As Python gives arguments whose bytes are not UTF-8."""
    words, seen = ["--prompt", "caf\udce9"], []
    monkeypatch.setattr("sys.argv", ["ponder", *words])
    with pytest.raises(SystemExit):
        command(seen.append)(words if given else None)
    assert not seen
    assert capsys.readouterr().err == (
        "error: 'caf\\udce9' cannot be written as utf-8: leave out or replace '\\udce9'\n"
    )


def test_text_that_cannot_be_written_is_one_line(capsys):
    error = UnicodeEncodeError("ascii", "x" * 50 + "é", 50, 51, "ordinal not in range")
    assert printed(capsys, error) == (
        f"error: '{'x' * 20}\\xe9' cannot be written as ascii: leave out or replace '\\xe9'\n"
    )
