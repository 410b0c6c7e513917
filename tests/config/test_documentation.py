"""Every key is documented beside it, once, and read by something."""

import ast
import dataclasses
from itertools import pairwise

import pytest

from docs.refresh import drawn
from megatron_ponder.config import BlendPart, Config, PhaseConfig
from megatron_ponder.config.documentation import FIRST, entries, help_text, key_table
from megatron_ponder.config.parsing import KEYS
from tests import REPOSITORY

SECTIONS = {section.name: section.default_factory for section in dataclasses.fields(Config)}


@pytest.mark.parametrize("section", [*SECTIONS.values(), BlendPart, PhaseConfig])
def test_every_key_says_below_it_what_it_means(section):
    source = ast.parse((REPOSITORY / f"{section.__module__.replace('.', '/')}.py").read_text(encoding="utf-8"))
    body = next(node for node in source.body if getattr(node, "name", "") == section.__name__).body
    for item, below in pairwise(body):
        if isinstance(item, ast.AnnAssign):
            assert isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant), item.target.id
            assert below.value.value.endswith("."), item.target.id
    assert "Attributes:" not in section.__doc__


def test_help_has_what_people_set_first_before_all_other_keys(monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    lines = help_text().splitlines()
    options = [line.split()[0].removeprefix("--") for line in lines if line.startswith("  --")]
    keys = [option for option in options if "." in option]
    assert keys[: len(FIRST)] == list(FIRST)
    assert len(FIRST) == 10
    assert sorted(keys) == sorted(KEYS)
    assert max(map(len, lines)) <= 100
    assert not any("](" in line for line in lines)
    assert "(1 to 1e12; default 50000)" in help_text()


def test_tables_have_a_row_for_every_key():
    table = key_table(SECTIONS["ponder_training"])
    assert (
        "| `prune_start` | – | 0 to 1e12 | Optimiser step from which training [prunes](training.md#how-many-steps)"
        in table
    )
    assert "| `jacobi_iterations` | `[2, 3]` | 0 to 1,000 |" in table
    assert len(table.splitlines()) == 2 + len(dataclasses.fields(SECTIONS["ponder_training"]))
    assert [entry.key for entry in entries(SECTIONS["tokenizer"])] == ["path"]


def test_every_key_is_read_by_something():
    read = set()
    for path in (REPOSITORY / "megatron_ponder").rglob("*.py"):
        nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        read |= {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    assert {key.rpartition(".")[2] for key in KEYS} - read == set()


def test_the_page_of_keys_has_these_tables():
    page = (REPOSITORY / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert drawn(page) == page, "python docs/refresh.py --house"
    assert all(key_table(section) in page for section in SECTIONS.values())
