"""Environment variables: empty is not set, and nothing that is no number gets further than one line."""

import os
import re

import pytest

from megatron_ponder.base.environment import (
    read_host,
    read_number,
    read_port,
    read_threads,
    read_word,
    without_local_rank,
)
from megatron_ponder.base.errors import UserError
from tests import REPOSITORY

COMMANDS = REPOSITORY / "megatron_ponder" / "commands"


@pytest.fixture
def local_rank(monkeypatch):
    """Sets LOCAL_RANK, or unsets it."""

    def local_rank(value: str | None) -> None:
        monkeypatch.setenv("LOCAL_RANK", value or "")  # remembers what to put back
        if value is None:
            del os.environ["LOCAL_RANK"]

    return local_rank


@pytest.mark.parametrize(("value", "number"), [("7", 7), (" 007\n", 7), ("", None), (" \t", None), (None, None)])
def test_numbers(value, number):
    environ = {} if value is None else {"N": value}
    assert read_number(environ, "N") == read_port(environ, "N") == number
    assert read_word(environ, "N") == (value.strip() if number else None)


@pytest.mark.parametrize(
    "value", ["x", "-1", "+1", "1.0", "1_0", "0x1", "²", "١", "1,2", "1 2", "9" * 5000, "4294967296"]
)
def test_what_is_no_number_is_named_with_its_variable(value):
    with pytest.raises(UserError, match="set it to one, or unset it") as caught:
        read_number({"SOME_RANK": value}, "SOME_RANK")
    assert str(caught.value).startswith(f'SOME_RANK is "{value}", not a number from 0 to 4294967295')


def test_a_port_is_0_for_any():
    assert read_port({"P": "0"}, "P") is None
    with pytest.raises(UserError, match='P is "65536", not a number from 0 to 65535'):
        read_port({"P": "65536"}, "P")


def test_hosts():
    assert read_host({"H": " fe80::1 "}, "H") == "fe80::1"
    assert read_host({"H": ""}, "H") is None
    for value in ("a b", "tcp://a:1"):
        with pytest.raises(UserError, match=f'H is "{value}", not a host name'):
            read_host({"H": value}, "H")


@pytest.mark.parametrize(("value", "threads"), [("2,1", 2), ("4", 4), ("", None), (",1", None)])
def test_threads(value, threads):
    assert read_threads({"OMP_NUM_THREADS": value}) == threads


@pytest.mark.parametrize(
    "given", [["--local_rank=3", "--a", "b"], ["--local-rank", "3", "--a", "b"], ["--a", "b", "--local_rank", "3"]]
)
@pytest.mark.parametrize("known", [None, "", "3"])
def test_a_local_rank_of_the_command_line_is_that_of_the_launcher(local_rank, given, known):
    local_rank(known)
    assert without_local_rank(given) == ["--a", "b"]
    assert os.environ["LOCAL_RANK"] == "3"


def test_a_command_line_without_it_is_left_alone(local_rank):
    local_rank(None)
    assert without_local_rank(["--local_ranks=3", "local_rank"]) == ["--local_ranks=3", "local_rank"]
    assert "LOCAL_RANK" not in os.environ


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--local_rank=x"], '--local_rank is "x", not a number'),
        (["--local_rank"], "--local_rank is empty and LOCAL_RANK 1"),
        (["--local-rank=2"], "--local-rank is 2 and LOCAL_RANK 1; leave --local-rank to the launcher"),
    ],
)
def test_a_local_rank_that_contradicts_is_refused(local_rank, given, message):
    local_rank("1")
    with pytest.raises(UserError, match=message):
        without_local_rank(given)


def test_numbers_are_read_here_alone():
    package = [
        path for path in (REPOSITORY / "megatron_ponder").rglob("*.py") if path.stem not in ("environment", "errors")
    ]
    for path in [*package, *(REPOSITORY / "tools").glob("*.py"), REPOSITORY / "pretrain_ponder.py"]:
        assert not re.search(r"(int|float)\([^\n]*environ", path.read_text(encoding="utf-8")), path


@pytest.mark.parametrize("program", ["train", "generate", "serve", "preprocess"])
def test_every_program_of_several_ranks_takes_the_option_of_launchers(program):
    assert "without_local_rank(argv)" in (REPOSITORY / f"megatron_ponder/commands/{program}.py").read_text(
        encoding="utf-8"
    )
