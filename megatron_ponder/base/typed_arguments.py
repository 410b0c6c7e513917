"""Dataclasses read from YAML and command lines by jsonargparse, with our YAML and our words."""

import argparse
import re
import types
import warnings
from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from dataclasses import fields, is_dataclass
from typing import TYPE_CHECKING, Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

import megatron_ponder
from megatron_ponder.base.errors import UserError
from megatron_ponder.base.whole_numbers import whole_number
from megatron_ponder.base.yaml_files import dump_yaml, load_yaml

if TYPE_CHECKING:
    import jsonargparse

_NAMES = {int: "whole number", float: "number", str: "text", bool: "true or false"}


def parser_of(name: str, kind: type, file_option: str) -> "jsonargparse.ArgumentParser":
    """A parser of a dataclass: an option for each of its keys, and one for a file of them.

    Args:
        name: of the command that takes them, after `ponder`.
        kind: the dataclass, whose fields may be dataclasses.
        file_option: for the file, with its dashes.
    """
    import jsonargparse

    jsonargparse.set_loader("our_yaml", load_yaml, (yaml.YAMLError,))
    parser = jsonargparse.ArgumentParser(
        prog=f"ponder {name}",
        exit_on_error=False,
        parser_mode="our_yaml",
        print_config=None,
        version=megatron_ponder.__version__,
    )
    parser.add_argument(file_option, action="config", help="YAML file with any of the keys below.")
    parser.add_class_arguments(kind, nested_key=None, fail_untyped=True)
    for action in parser._actions:  # whole sections, and help on types, are jsonargparse's and not ours
        if is_dataclass(type_of(kind, action.dest)) or action.dest.endswith(".help"):
            action.help = argparse.SUPPRESS
    return parser


def parse(parser: "jsonargparse.ArgumentParser", kind: type, arguments: Sequence[str]) -> Any:
    """The dataclass that a command line describes; later arguments win.

    Args:
        parser: of `parser_of`.
        kind: the dataclass.
        arguments: a file is given by its content, as `content_of` writes it.

    Raises:
        UserError: an argument is unknown or has the wrong type; one line.
    """
    import jsonargparse

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # deprecations that jsonargparse announces to library authors
            words = [_written_out(kind, argument) for argument in arguments]
            namespace = parser.parse_args(words, defaults=False)  # the dataclasses know theirs
            parts = (parser.instantiate if hasattr(parser, "instantiate") else parser.instantiate_classes)(namespace)
    except (argparse.ArgumentError, jsonargparse.ArgumentError, TypeError, ValueError, OverflowError) as error:
        raise UserError(_in_words(kind, " ".join(str(error).split()))) from error
    return kind(**{item.name: getattr(parts, item.name) for item in fields(kind) if hasattr(parts, item.name)})


def options_of(arguments: Sequence[str], alone: Collection[str] = ()) -> Iterator[tuple[str, str | None]]:
    """Names and values of a command line of `--name value` and `--name=value`; the value is None of names in `alone`.

    Raises:
        UserError: an argument is neither a name nor a value, or a name has no value.
    """
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        if not argument.startswith("--"):
            raise UserError(f'"{argument}" is no option; write --key value, and in quotes if a value has spaces')
        name, equals, value = argument[2:].partition("=")
        if equals:
            yield name, value
        elif name in alone:
            yield name, None
        elif rest:
            yield name, rest.pop(0)
        else:
            raise UserError(f"--{name} has no value; write --{name} VALUE")


def content_of(mapping: dict) -> str:
    """What a file says, as the value of the option for it."""
    return dump_yaml(mapping)


def type_of(kind: type, key: str) -> Any:
    """The type of a dotted key of a dataclass; None if there is no such key."""
    for name in key.split("."):
        kind = get_type_hints(kind).get(name) if is_dataclass(kind) else None
    return kind


def wanted(kind: Any) -> str:
    """What a value of a type is, in words."""
    parts = get_args(kind)
    if get_origin(kind) is Literal:
        return f"one of {', '.join(map(str, parts))}"
    if get_origin(kind) in (Union, types.UnionType):
        *some, last = [wanted(part) for part in parts if part is not type(None)]
        either = f"{', '.join(some)} or {last}" if some else last
        return f"{either}, or null" if type(None) in parts else either
    if get_origin(kind) is tuple:
        return f"a list of {len(parts)} {_NAMES[parts[0]]}s"
    if get_origin(kind) is list:
        return f"a list of {_NAMES[parts[0]]}s" if parts[0] in _NAMES else "a list"
    if get_origin(kind) is dict:
        return f"keys with {wanted(parts[1])} each"
    if is_dataclass(kind):
        return f"keys {', '.join(item.name for item in fields(kind))}"
    return _NAMES[kind] if kind in (bool, str) else f"a {_NAMES[kind]}"


def _written_out(kind: type, argument: str) -> str:
    """An option as it is, but for a whole number with an exponent, which jsonargparse takes for one with a fraction."""
    name, _, value = argument.removeprefix("--").partition("=")
    type_ = type_of(kind, name)
    if int in (type_, *get_args(type_)):
        with suppress(ValueError):
            return f"--{name}={whole_number(value)}"
    return argument


def _in_words(kind: type, message: str) -> str:
    """Our words for what jsonargparse says, where it is about the type of a key; else its own, on one line."""
    found = re.search(r'Parser key "([\w.]+)"', message)
    type_ = found and type_of(kind, found[1])
    values = re.findall(r"(?:Got value|Given value): (.*?)(?= Given value type:|$)", message)
    if not type_ or not values:
        return message.replace("Parser key", "configuration key")
    value = {"None": "null", "True": "true", "False": "false"}.get(values[-1], values[-1])
    quotes = "; put it in quotes" if str in (type_, *get_args(type_)) else ""
    spaces = "; put a space behind every colon" if re.search(r"\w:\w+': None", value) else ""
    return f"{found[1]} is {_shortened(value)}; write {wanted(type_)}{quotes}{spaces}"


def _shortened(text: str) -> str:
    return text if len(text) <= 80 else f"{text[:60]}… ({len(text):,} characters)"
