"""Options that are fields of a dataclass."""

import argparse
from dataclasses import dataclass, field, fields
from typing import Literal

import pytest

from megatron_ponder.base.command_line import Parser
from megatron_ponder.base.errors import UserError
from megatron_ponder.config.command_options import add_options, from_options, help_of
from megatron_ponder.config.declarations import number_field, path_field


@dataclass(frozen=True)
class Oven:
    """What bakes.

    Attributes:
        heat: degrees, 100 % of them.
        trays, racks: of each kind.
        kind: what it burns.
        timers: minutes.
        levels: shares of the heat.
        book: of recipes.
    """

    heat: float = number_field(180.0, 0, 300)
    trays: int | None = number_field(None, 1, 9)
    racks: int = number_field(0, 0, 9)
    fan: bool = False
    """Whether air is moved."""
    kind: Literal["gas", "electric"] = "gas"
    timers: tuple[int, ...] = number_field((), 0, 60)
    levels: tuple[float, ...] = number_field((0.5, 1.0), 0, 1)
    book: str = path_field("recipes")


@dataclass(frozen=True)
class Kitchen:
    """Where ovens are.

    Attributes:
        floor: which.
    """

    floor: int = number_field(1, 0, 9)
    heat: float = field(default=20.0, metadata=fields(Oven)[0].metadata | {"declared_in": Oven})
    oven: Oven = field(default_factory=Oven)


def parsed(*words: str) -> argparse.Namespace:
    parser = Parser("bake", "Bakes.")
    add_options(parser, Oven)
    add_options(parser.add_argument_group("kitchen"), Kitchen, "floor")
    return parser.parse_args(words)


def test_what_is_not_given_is_the_default():
    assert from_options(Oven, parsed()) == Oven()


def test_what_is_given_has_the_type_of_the_field(monkeypatch):
    monkeypatch.setenv("HOME", "/home/baker")
    arguments = parsed(
        "--heat=200",
        "--trays=2e0",
        "--fan",
        "--kind",
        "electric",
        "--timers",
        "5",
        "10",
        "--levels",
        "--book",
        "~/x",
        "--floor",
        "3",
    )
    oven = from_options(Oven, arguments)
    assert oven == Oven(200.0, 2, 0, True, "electric", (5, 10), (), "/home/baker/x")
    assert from_options(Kitchen, arguments, oven=oven) == Kitchen(3, 200.0, oven)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--trays 10", "argument --trays: trays is 10; its range is 1 to 9; see --help"),
        ("--trays many", "'many' is not a whole number"),
        ("--trays 1e1", "argument --trays: trays is 10; its range is 1 to 9; see --help"),
        ("--trays 1e-1", "'1e-1' is not a whole number"),
        ("--heat nan", "heat is nan; its range is 0 to 300"),
        ("--timers 5 61", "timers is 61; its range is 0 to 60"),
        ("--timers", "expected at least one argument"),
        ("--kind coal", "invalid choice: 'coal'"),
        ("--traiys 1", "did you mean --trays"),
    ],
)
def test_what_cannot_be_is_one_line(words, said):
    with pytest.raises(UserError) as caught:
        parsed(*words.split())
    assert said in str(caught.value)


def test_help_is_what_is_written_about_the_field(capsys):
    said = help_of(Oven)
    assert (said["trays"], said["racks"], said["fan"]) == ("of each kind", "of each kind", "Whether air is moved")
    assert help_of(Kitchen)["heat"] == said["heat"]
    with pytest.raises(SystemExit):
        parsed("--help")
    shown = " ".join(capsys.readouterr().out.split())
    for line in ("degrees, 100 % of them (default: 180.0)", "of each kind (default: 0)", "(default: 0.5 1.0)"):
        assert line in shown
    assert "--timers N [N ...] " in shown and "default: None" not in shown


def test_fields_of_other_dataclasses_without_words_are_found_out():
    @dataclass
    class Silent:
        size: int = number_field(1, 0, 9)

    with pytest.raises(KeyError):
        add_options(Parser("bake"), Silent)
