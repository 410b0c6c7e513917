"""What all tools have in common: a version, home folders in paths, and words for options that there are not."""

import argparse
import os
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

import megatron_ponder
from megatron_ponder.base.command_line import Parser
from megatron_ponder.base.errors import UserError
from megatron_ponder.base.paths import expand_user
from tests.finished_runs import REPOSITORY

TOOLS = sorted(path for path in (REPOSITORY / "tools").glob("*.py"))
COMMANDS = [*TOOLS, REPOSITORY / "pretrain_ponder.py"]
# Those that take the keys of a configuration or of a cluster, or torchrun's options, in place of their own.
WITHOUT_PARSER = {"build_index", "submit", "torchrun"}
# Arguments that are no paths.
WORDS = {"--device", "--format", "--gpu", "--host", "--key", "--max-shard-size", "--model-name", "--prompt", "--stop"}
WORDS |= {"--tasks"}


class Found(Exception):  # noqa: N818, it is no error
    """Carries the parser of a tool out of it."""


def run(path: Path, arguments: Sequence[str], monkeypatch) -> int:
    """The exit code of a command in this process."""
    before = dict(os.environ)
    monkeypatch.setattr(sys, "argv", [str(path), *arguments])
    monkeypatch.chdir(REPOSITORY)
    try:
        runpy.run_path(str(path), run_name="__main__")
    except SystemExit as end:
        return end.code or 0
    finally:
        os.environ.clear()
        os.environ.update(before)
    return 0


def parser_of(path: Path, monkeypatch) -> Parser:
    """The parser of a tool."""

    def find(self, *_):
        raise Found(self)

    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", find)
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", find)
    with pytest.raises(Found) as caught:
        run(path, [], monkeypatch)
    return caught.value.args[0]


PARSED = [path for path in TOOLS if path.stem not in WITHOUT_PARSER]


@pytest.mark.parametrize("path", PARSED, ids=lambda path: path.stem)
def test_every_argument_of_a_tool_is_a_path_or_known_to_be_none(path, monkeypatch):
    parser = parser_of(path, monkeypatch)
    assert isinstance(parser, Parser)
    for action in parser._actions:
        name = action.option_strings[-1] if action.option_strings else action.dest
        if action.nargs != 0 and action.type is None and action.choices is None and name not in ("--help", "--version"):
            assert name in WORDS, f"{path.name} {name}: type=Path or expand_user if it is a path, else add it here"
        if action.type is not None:
            assert action.type in (Path, expand_user, int, float) or action.choices


@pytest.mark.parametrize("path", COMMANDS, ids=lambda path: path.stem)
def test_every_command_says_its_version(path, monkeypatch, capsys):
    assert run(path, ["--version"], monkeypatch) == 0
    assert capsys.readouterr().out.endswith(f" {megatron_ponder.__version__}\n")


def parse(*arguments: str) -> argparse.Namespace:
    parser = Parser("A tool.")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--prefix", type=expand_user, nargs="+")
    parser.add_argument("--samples", type=int)
    return parser.parse_args(arguments)


def test_the_home_folder_is_expanded(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    parsed = parse("--output=~/x", "--prefix", "~/a", "hf://b~")
    assert (parsed.output, parsed.prefix) == (tmp_path / "x", [f"{tmp_path}/a", "hf://b~"])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--ouput", "x"], "there is no option --ouput; did you mean --output? There are --help, --version, --output,"),
        (["--zzz"], "there is no option --zzz; there are --help, --version, --output, --prefix, --samples; see --help"),
        (["--out", "x"], "there is no option --out; did you mean --output?"),
        ([], "the following arguments are required: --output"),
        (["--output", "x", "--samples", "many"], "argument --samples: invalid int value: 'many'"),
        (["--output", "~nobody_of_this_name/x"], "~nobody_of_this_name/x: it is not known where ~nobody_of_this_name"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(arguments, said):
    with pytest.raises(UserError) as caught:
        parse(*arguments)
    assert said in str(caught.value) and "\n" not in str(caught.value)
    assert caught.value.shared


def test_a_value_may_look_like_an_option_where_it_is_tied_to_one():
    assert parse("--output=--x").output == Path("--x")


def test_overrides_of_a_configuration_are_left_to_it(monkeypatch):
    parser = Parser("A tool.")
    parser.add_argument("--nodes", type=int)
    monkeypatch.setattr(sys, "argv", ["tool", "--nodes", "2", "--parallel.tensor", "4"])
    assert parser.parse_with_overrides() == (argparse.Namespace(nodes=2), ["--parallel.tensor", "4"])
    monkeypatch.setattr(sys, "argv", ["tool", "--node", "2", "--parallel.tensor", "4"])
    with pytest.raises(UserError, match="there is no option --node; did you mean --nodes"):
        parser.parse_with_overrides()
