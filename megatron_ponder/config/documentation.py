"""What is written about every key, beside the key, as `ponder train --help` and as tables of a page."""

import argparse
import re
import types
from collections.abc import Iterator
from dataclasses import MISSING, Field, fields, is_dataclass
from itertools import groupby
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

from megatron_ponder.config.command_options import help_of
from megatron_ponder.config.declarations import is_path, range_of
from megatron_ponder.config.sections import Config

USAGE = "ponder train --config FILE.yaml [--SECTION.KEY VALUE ...]"
# What people set first, in the order in which a run needs it.
FIRST = (
    "data.path",
    "tokenizer.path",
    "training.run_dir",
    "training.steps",
    "training.global_batch_size",
    "training.micro_batch_size",
    "optimizer.learning_rate",
    "ponder.mode",
    "ponder.latent_steps",
    "checkpoint.resume",
)
_OPTIONS = {
    "--config": ("FILE.yaml", "A file with sections, and keys below them; options override it."),
    "--print_config": (None, "Show the configuration that the other options make, and end."),
    "--version": (None, "Show the version, and end."),
}
_VALUES = {int: "N", float: "X", str: "TEXT", bool: "{true,false}"}


class Entry(NamedTuple):
    """What is said about a key.

    Attributes:
        key: without its section.
        values: that it may have, in a word.
        default: as it is written; empty if there is none.
        allowed: its range in words; empty if it has none.
        meaning: in Markdown.
    """

    key: str
    values: str
    default: str
    allowed: str
    meaning: str


def entries(section: type) -> Iterator[Entry]:
    """What is said about each key of a section."""
    hints, said = get_type_hints(section), help_of(section)
    for item in fields(section):
        allowed = range_of(item)
        values = "PATH" if is_path(item) else _values(hints[item.name])
        yield Entry(item.name, values, _default(item), "" if allowed is None else f"{allowed}", said[item.name])


def plain(text: str) -> str:
    """A text without Markdown's marks of links and code."""
    return re.sub(r"\[([^]]+)\]\([^)]+\)", r"\1", text).replace("`", "")


def key_table(section: type) -> str:
    """The keys of a section as a table in Markdown."""
    rows = ["| key | default | range | meaning |", "|---|---|---|---|"]
    for entry in entries(section):
        default = f"`{entry.default}`" if entry.default else "–"
        rows.append(f"| `{entry.key}` | {default} | {entry.allowed or '–'} | {entry.meaning}. |")
    return "".join(f"{row}\n" for row in rows)


def help_text() -> str:
    """What `--help` prints: the keys that people set first, then the others by section."""
    parser = argparse.ArgumentParser(usage=USAGE, add_help=False)
    options = parser.add_argument_group("options")
    options.add_argument("-h", "--help", action="help", help="Show this, and end.")
    for option, (values, meaning) in _OPTIONS.items():
        action = {"action": "store_true"} if values is None else {"metavar": values}
        options.add_argument(option, help=meaning, **action)
    first = parser.add_argument_group("what people set first")
    sections = {section.name: section.default_factory for section in fields(Config)}
    known = {f"{name}.{entry.key}": entry for name, section in sections.items() for entry in entries(section)}
    for key in FIRST:
        _add(first, key, known.pop(key))
    for name, keys in groupby(known, key=lambda key: key.partition(".")[0]):
        group = parser.add_argument_group(name, sections[name].__doc__.partition("\n")[0])
        for key in keys:
            _add(group, key, known[key])
    return parser.format_help()


def _add(group: argparse._ArgumentGroup, key: str, entry: Entry) -> None:
    notes = [entry.allowed, entry.default and f"default {entry.default}"]
    text = plain(entry.meaning)
    in_brackets = "; ".join(filter(None, notes))
    text = f"{text} ({in_brackets})" if in_brackets else text
    group.add_argument(f"--{key}", metavar=entry.values, help=text.replace("%", "%%"))


def _values(kind: Any) -> str:
    """What stands for a value of a type in a line of help."""
    parts = [part for part in get_args(kind) if part is not types.NoneType]
    if get_origin(kind) is Literal:
        return f"{{{','.join(parts)}}}"
    if get_origin(kind) in (Union, types.UnionType):
        return "|".join(dict.fromkeys(map(_values, parts)))
    if is_dataclass(kind):
        return "MAPPING"
    return {list: "LIST", tuple: "LIST", dict: "MAPPING"}.get(get_origin(kind)) or _VALUES[kind]


def _default(item: Field) -> str:
    """The default of a key as YAML has it; empty if nothing stands there."""
    value = item.default_factory() if item.default is MISSING else item.default
    if isinstance(value, bool):
        return f"{value}".lower()
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(str, value))}]"
    if isinstance(value, float):
        return re.sub(r"e([+-])0*", lambda sign: f"e{sign[1].strip('+')}", f"{value:g}")
    return "" if value is None else str(value)
