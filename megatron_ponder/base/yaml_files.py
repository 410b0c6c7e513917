"""YAML as people mean it, read in one place: configurations, descriptions of clusters and of tasks.

It differs from PyYAML in what it refuses (a key that is there twice, of which one would be dropped in silence) and in
what it takes for a number: `010` is ten, `1e-4` is a number, `1e6` a whole one, and `24:00:00` and `2026-01-31` are
text.
"""

import re
from pathlib import Path
from typing import ClassVar, NoReturn

import yaml

from megatron_ponder.base.errors import UserError
from megatron_ponder.base.texts import check_text, read_text
from megatron_ponder.base.whole_numbers import LONGEST_NUMBER, whole_number

LARGEST_FILE = 1 << 20  # bytes; what is meant to be read has a hundred lines
MOST_VALUES = 20_000  # with aliases followed
DEEPEST = 32

_WHOLE = re.compile(r"[-+]?([0-9][0-9_]*|0x[0-9a-fA-F]+)$")
_NUMBER = re.compile(
    r"[-+]?([0-9][0-9_]*(\.[0-9_]*)?|\.[0-9][0-9_]*)([eE][-+]?[0-9]+)?$|[-+]?\.(inf|Inf|INF)$|\.(nan|NaN|NAN)$"
)
# PyYAML's own have base-60 numbers, dates that are not text, and no exponent without a point.
_NUMBERS = {f"tag:yaml.org,2002:{kind}" for kind in ("int", "float")}
_REPLACED = _NUMBERS | {"tag:yaml.org,2002:timestamp"}


class Loader(yaml.SafeLoader):
    """PyYAML's safe loader with our numbers and refusals; in Python, as the one in C falls over deep nesting."""

    yaml_implicit_resolvers: ClassVar = {
        first: [(tag, pattern) for tag, pattern in known if tag not in _REPLACED]
        for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def __init__(self, text: str):
        super().__init__(text)
        self._depth = self._values = 0
        self._below: dict[str, int] = {}  # values of each anchor

    def compose_node(self, parent, index):
        """Compose as PyYAML does, counting levels and values."""
        event, before = self.peek_event(), self._values
        anchor, alias = event.anchor, isinstance(event, yaml.AliasEvent)
        if getattr(event, "tag", None) is not None:
            _refuse(
                f"the tag {event.tag.replace('tag:yaml.org,2002:', '!!')} is not read; leave it out", event.start_mark
            )
        if alias and anchor in self.anchors and anchor not in self._below:
            _refuse(f"*{anchor} is a part of itself", event.start_mark)
        self._depth += 1
        self._values += self._below.get(anchor, 1) if alias else 1
        if self._depth > DEEPEST:
            _refuse(f"this is nested more than {DEEPEST} levels deep", event.start_mark)
        if self._values > MOST_VALUES:
            _refuse(f"this is the end of the first {MOST_VALUES:,} values, which is too many", event.start_mark)
        node = super().compose_node(parent, index)
        if anchor and not alias:
            self._below[anchor] = self._values - before
        self._depth -= 1
        return node

    def compose_mapping_node(self, anchor):
        """Compose as PyYAML does, refusing keys that are there already, or true or false, which count as 1 and 0."""
        node = super().compose_mapping_node(anchor)
        lines = {}
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.tag == "tag:yaml.org,2002:bool":
                _refuse(f"`{key.value}` is true or false, which is no key; put it in quotes", key.start_mark)
            # as it is written, and as the number that it is: `1` and `01` are one key
            for name in {key.value, self.construct_object(key) if key.tag in _NUMBERS else key.value}:
                if name in lines:
                    _refuse(
                        f"`{key.value}` is there already, in line {lines[name] + 1}; keep one of them", key.start_mark
                    )
                lines[name] = key.start_mark.line
        return node

    def construct_whole(self, node: yaml.ScalarNode) -> int:
        """A whole number, decimal unless it begins with 0x."""
        text = self._digits(node)
        return int(text, 16 if "x" in text else 10)

    def construct_number(self, node: yaml.ScalarNode) -> float:
        """A number with a fraction or an exponent, which may make it whole, infinity, or what is no number."""
        text = self._digits(node).lower()
        try:
            return whole_number(text)
        except ValueError:
            return float(text.replace(".inf", "inf").replace(".nan", "nan"))

    @staticmethod
    def _digits(node: yaml.ScalarNode) -> str:
        if len(node.value) > LONGEST_NUMBER:
            _refuse(f"a number of {len(node.value):,} characters is too long", node.start_mark)
        return node.value.replace("_", "")


Loader.add_implicit_resolver("tag:yaml.org,2002:int", _WHOLE, list("-+0123456789"))
Loader.add_implicit_resolver("tag:yaml.org,2002:float", _NUMBER, list("-+.0123456789"))
Loader.add_constructor("tag:yaml.org,2002:int", Loader.construct_whole)
Loader.add_constructor("tag:yaml.org,2002:float", Loader.construct_number)


class TextLoader(Loader):
    """Our loader for values that are texts whatever they look like: `1`, `010` and `yes` are what is written."""

    yaml_implicit_resolvers: ClassVar = {
        first: [(tag, pattern) for tag, pattern in known if tag.endswith((":null", ":merge"))]
        for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


class Dumper(yaml.SafeDumper):
    """PyYAML's safe dumper, which puts into quotes what our loader would not take for text."""

    yaml_implicit_resolvers = Loader.yaml_implicit_resolvers


def load_yaml(text: str, loader: type[Loader] = Loader) -> object:
    """What a text in YAML says.

    Args:
        text: to read.
        loader: ours, or the one for texts alone.

    Raises:
        yaml.YAMLError: it says nothing, or something in two ways; `in_words` has the reason.
    """
    content = yaml.load(text, loader)
    try:
        check_text(content, "it")
    except UserError as error:
        raise yaml.YAMLError(str(error)) from None
    return content


def dump_yaml(content: object) -> str:
    """A text that `load_yaml` reads as `content`, in the order of its keys."""
    return yaml.dump(content, Dumper=Dumper, sort_keys=False, allow_unicode=True)


def inline_yaml(value: object) -> str:
    """A value as it may stand behind a key, on one line."""
    return yaml.dump([value], Dumper=Dumper, default_flow_style=True, allow_unicode=True, width=2**31).strip()[1:-1]


def read_mapping(path: Path, holds: str, loader: type[Loader] = Loader) -> dict:
    """The keys and values of a YAML file.

    Args:
        path: of the file.
        holds: what such a file has in it, for the message if it does not.
        loader: ours, or the one for texts alone.

    Raises:
        UserError: it is missing, is no YAML, has a key twice, or holds no keys; with the line, where there is one.
    """
    if not path.is_file():
        raise UserError(f"there is no file {path}; it must hold {holds}")
    if path.stat().st_size > LARGEST_FILE:
        raise UserError(f"{path} has {path.stat().st_size:,} bytes, which no such file has; it must hold {holds}")
    text = read_text(path)
    try:
        content = load_yaml(text, loader)
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {in_words(error, text)}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} must hold {holds}")
    return content


def in_words(error: yaml.YAMLError, text: str) -> str:
    """One line for a refusal: the line of the text, and what is wrong there."""
    if isinstance(error, yaml.reader.ReaderError):
        line, problem = text.count("\n", 0, error.position), f"the character {chr(error.character)!r} cannot be in YAML"
    elif isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        line, problem = error.problem_mark.line, error.problem.replace("but found", f"{error.context}, but found")
    else:
        return " ".join(str(error).split())
    if "'\\t' that cannot start" in problem:
        problem = "a tab cannot indent; write spaces"
    return f"line {line + 1}: {' '.join(problem.split())}"


def _refuse(problem: str, mark: yaml.Mark) -> NoReturn:
    raise yaml.composer.ComposerError(None, None, problem, mark)
