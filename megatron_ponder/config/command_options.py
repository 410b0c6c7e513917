"""Options of a command that are fields of a dataclass, where alone type, default, range and help are declared."""

import argparse
import functools
from collections.abc import Callable
from dataclasses import MISSING, Field, fields
from pathlib import Path
from types import NoneType
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from megatron_ponder.base.paths import expand_user
from megatron_ponder.base.whole_numbers import whole_number
from megatron_ponder.config.declarations import Range, is_path, range_of, written

Kind = TypeVar("Kind")


def add_options(parser: argparse._ActionsContainer, kind: type, *names: str) -> None:
    """Add an option for each of these fields of a dataclass, or for all of them.

    `max_slots` becomes `--max-slots`. A tuple takes several values, and a truth value that is false stands alone.

    Args:
        parser: or a group of one.
        kind: the dataclass.
        names: of fields.
    """
    hints, said = get_type_hints(kind), help_of(kind)
    for item in fields(kind):
        if item.name in names or not names:
            described = _described(said[item.name], item.default)
            parser.add_argument(f"--{item.name.replace('_', '-')}", help=described, **_values(item, hints[item.name]))


def from_options(kind: type[Kind], arguments: argparse.Namespace, **others: Any) -> Kind:
    """The dataclass with what a command line says of its fields.

    Args:
        kind: the dataclass.
        arguments: the command line, parsed.
        others: fields that are no options.
    """
    given = {item.name: getattr(arguments, item.name) for item in fields(kind) if hasattr(arguments, item.name)}
    return kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in given.items()} | others)


@functools.cache
def help_of(kind: type) -> dict[str, str]:
    """What is written about each field of a dataclass, in its docstring or below the field."""
    import docstring_parser

    said = {
        item.name: help_of(item.metadata["declared_in"])[item.name]
        for item in fields(kind)
        if "declared_in" in item.metadata
    }
    for one in docstring_parser.parse_from_object(kind).params:
        said |= dict.fromkeys(one.arg_name.split(", "), " ".join((one.description or "").split()).rstrip("."))
    return said


def _described(text: str, default: Any) -> str:
    """The help of an option; % is argparse's own."""
    if isinstance(default, tuple):
        default = " ".join(map(str, default)) or None
    shown = not any(default is nothing for nothing in (None, MISSING, False))
    return f"{text} (default: {default})".replace("%", "%%") if shown else text.replace("%", "%%")


def _values(item: Field, hint: Any) -> dict[str, Any]:
    """What argparse has to know of the values of a field."""
    hint = next((part for part in get_args(hint) if part is not NoneType), hint) if NoneType in get_args(hint) else hint
    if hint is bool:
        assert item.default is False, f"--{item.name} could not be switched off"
        return {"action": "store_true"}
    if get_origin(hint) is Literal:
        return {"choices": get_args(hint), "default": item.default}
    several = get_origin(hint) is tuple
    kind = get_args(hint)[0] if several else hint
    known = {"type": _reader(item, kind), "metavar": "PATH" if is_path(item) else _METAVARS[kind]}
    if several:
        # of several by default, there may be none
        known["nargs"] = "+" if item.default in (MISSING, ()) else "*"
    return known | ({"required": True} if item.default is MISSING else {"default": item.default})


def _reader(item: Field, kind: type) -> Callable[[str], Any]:
    if kind in (int, float):
        return Number(item.name, kind, range_of(item))
    return expand_user if is_path(item) else kind


class Number:
    """Reads a number of a command line, and refuses one out of its range."""

    def __init__(self, name: str, kind: type, allowed: Range | None) -> None:
        """Read the field of this name, of this kind and in this range."""
        self._name, self._kind, self._allowed = name, kind, allowed

    def __call__(self, text: str) -> float:
        """The number in a text.

        Raises:
            argparse.ArgumentTypeError: it is none, or out of its range.
        """
        try:
            value = whole_number(text) if self._kind is int else self._kind(text)
        except ValueError:
            a_number = "a whole number" if self._kind is int else "a number"
            raise argparse.ArgumentTypeError(f"{text!r} is not {a_number}") from None
        if self._allowed is not None and value not in self._allowed:
            raise argparse.ArgumentTypeError(f"{self._name} is {written(value)}; its range is {self._allowed}")
        return value


_METAVARS = {int: "N", float: "X", str: "TEXT", Path: "PATH"}
