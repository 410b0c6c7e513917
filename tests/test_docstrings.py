"""How docstrings begin, so that a list of them reads by itself."""

import ast
from collections.abc import Iterator
from pathlib import Path

from tests import REPOSITORY

PACKAGE = REPOSITORY / "megatron_ponder"
# A first word is a verb, or the noun of the result.
NO_BEGINNING = {"Of", "In", "With", "For", "Until", "As", "At", "By", "From", "To", "Between", "Attributes:", "Args:"}


def docstrings(path: Path) -> Iterator[tuple[int, str]]:
    """Line and docstring of every public class and function of a file."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) and node.name[0] != "_":
            yield from ((node.lineno, text) for text in [ast.get_docstring(node)] if text)


def test_a_docstring_begins_with_a_verb_or_the_noun_of_the_result():
    found = [
        f"{path.relative_to(PACKAGE)}:{line} {text.splitlines()[0]}"
        for path in PACKAGE.rglob("*.py")
        for line, text in docstrings(path)
        if text.split()[0] in NO_BEGINNING or text.split()[0].endswith(":")
    ]
    assert found == []
