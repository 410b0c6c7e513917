"""What all commands have in common: home folders in paths, and words for options that there are not."""

import argparse
from pathlib import Path

import pytest

from megatron_ponder.base.command_line import Parser
from megatron_ponder.base.errors import UserError
from megatron_ponder.base.paths import expand_user
from megatron_ponder.commands.ponder import COMMANDS
from megatron_ponder.commands.ponder import main as ponder
from megatron_ponder.config.command_options import Number

# Those that take the keys of a configuration or of a cluster, or torchrun's options, in place of their own.
WITHOUT_PARSER = {"build-index", "submit", "torchrun", "train"}
# Arguments that are no paths.
WORDS = {"--device", "--format", "--gpu", "--host", "--key", "--max-shard-size", "--model-name", "--prompt", "--stop"}
WORDS |= {"--confidence-exit", "--size", "--split", "--tasks"}


class Found(Exception):  # noqa: N818, it is no error
    """Carries the parser of a command out of it."""


def parser_of(name: str, monkeypatch) -> Parser:
    """The parser of a command."""

    def find(self, *_):
        raise Found(self)

    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", find)
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", find)
    with pytest.raises(Found) as caught:
        ponder([name])
    return caught.value.args[0]


@pytest.mark.parametrize("command", [name for name in COMMANDS if name not in WITHOUT_PARSER])
def test_every_argument_of_a_command_is_a_path_or_known_to_be_none(command, monkeypatch):
    parser = parser_of(command, monkeypatch)
    assert isinstance(parser, Parser)
    for action in parser._actions:
        name = action.option_strings[-1] if action.option_strings else action.dest
        if action.nargs != 0 and action.type is None and action.choices is None and name not in ("--help", "--version"):
            assert name in WORDS, f"{command} {name}: type=Path or expand_user if it is a path, else add it here"
        if action.type is not None:
            known = isinstance(action.type, Number) or action.type in (Path, expand_user)
            assert known or action.choices or name in WORDS, f"{command} {name}: a number has a range, see Number"


def parse(*arguments: str) -> argparse.Namespace:
    parser = Parser("tool", "A tool.")
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


def test_overrides_of_a_configuration_are_left_to_it():
    parser = Parser("tool", "A tool.")
    parser.add_argument("--nodes", type=int)
    given, overrides = parser.parse_with_overrides(["--nodes", "2", "--parallel.tensor", "4"])
    assert (given, overrides) == (argparse.Namespace(nodes=2), ["--parallel.tensor", "4"])
    with pytest.raises(UserError, match="there is no option --node; did you mean --nodes"):
        parser.parse_with_overrides(["--node", "2", "--parallel.tensor", "4"])
