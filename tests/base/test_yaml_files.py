"""YAML as people mean it, and what is refused with its line."""

import math

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from megatron_ponder.base.errors import UserError
from megatron_ponder.base.yaml_files import LARGEST_FILE, dump_yaml, load_yaml, read_mapping
from megatron_ponder.cluster.description import read_cluster
from megatron_ponder.config import read_config
from megatron_ponder.runs.status import run_status


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("010", 10),
        ("-007", -7),
        ("1_000", 1000),
        ("0x1F", 31),
        ("1e-4", 1e-4),
        ("3E2", 300),
        (".5", 0.5),
        ("-.inf", -math.inf),
        ("24:00:00", "24:00:00"),
        ("1:30", "1:30"),
        ("2026-01-31", "2026-01-31"),
        ("969,30,1", "969,30,1"),
        ("1f1b", "1f1b"),
        ("no", False),
        ("~", None),
        ("{a: &x [1], b: *x}", {"a": [1], "b": [1]}),
        ("{<<: {a: 1}, b: 2}", {"a": 1, "b": 2}),
    ],
)
def test_values_are_what_people_mean(text, value):
    assert load_yaml(text) == value
    assert type(load_yaml(text)) is type(value)


WORDS = st.text(st.characters(codec="utf-8", categories=["L", "N", "P", "Z", "S"]), max_size=12)
TRICKY = st.sampled_from(["010", "1e-4", "24:00:00", "2026-01-31", "null", "~", "no", ".nan", "0x1F", "1_0", "=", "<<"])
VALUES = st.none() | st.booleans() | st.integers(-(10**30), 10**30) | st.floats(allow_nan=False) | WORDS | TRICKY


@given(st.dictionaries(TRICKY | WORDS, VALUES | st.lists(VALUES, max_size=3), max_size=4))
def test_what_is_written_is_read_again(content):
    assert load_yaml(dump_yaml(content)) == content


BOMB = "\n".join(f"a{level}: &a{level} [{', '.join([f'*a{level - 1}' if level else '1'] * 9)}]" for level in range(9))
REFUSED = {
    "a key twice": (
        "model:\n  hidden_size: 1\n  hidden_size: 2\n",
        "line 3: `hidden_size` is there already, in line",
    ),
    "a section twice": ("training:\n  steps: 1\nmodel:\n  num_layers: 2\ntraining:\n  seed: 1\n", "line 5: `training`"),
    "a key twice in braces": ("model: {hidden_size: 1, hidden_size: 2}", "line 1: `hidden_size` is there already"),
    "a quoted key twice": ("model: {hidden_size: 1, 'hidden_size': 2}", "line 1: `hidden_size` is there already"),
    "a number twice as a key": ("a: {1: 2, 01: 3}", "line 1: `01` is there already, in line 1; keep one of them"),
    "true as a key": ("a:\n  true: 3", "line 2: `true` is true or false, which is no key; put it in quotes"),
    "a long number": (f"model:\n  hidden_size: {'9' * 5000}", "line 2: a number of 5,000 characters is too long"),
    "deep lists": ("[" * 3000, "line 1: this is nested more than 32 levels deep"),
    "deep mappings": ("{a: " * 3000, "line 1: this is nested more than 32 levels deep"),
    "aliases that multiply": (BOMB, "values, which is too many"),
    "an alias of itself": ("a: &x [*x]", "line 1: *x is a part of itself"),
    "a tab": ("model:\n\thidden_size: 1", "line 2: a tab cannot indent; write spaces"),
    "a tag": ("a: !!python/object:os.system ls", "line 1: the tag !!python/object:os.system is not read; leave it out"),
    "a list as key": ("[a]: 1", "line 1: "),
    "two documents": ("a: 1\n---\nb: 2", "line 2: expected a single document"),
    "a control character": ("a: 1\nb: \x07", "line 2: the character '\\x07' cannot be in YAML"),
    "a list": ("- a", "must hold such things"),
    "a number": ("3", "must hold such things"),
    "nothing": ("# nothing\n", "must hold such things"),
}


@pytest.mark.parametrize(("text", "said"), REFUSED.values(), ids=REFUSED.keys())
def test_a_file_is_refused_in_one_line(tmp_path, text, said):
    path = tmp_path / "file.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        read_mapping(path, "such things")
    assert str(caught.value).startswith(str(path))
    assert said in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'a: "\\ud800"', r"it has half a surrogate pair \(\\ud800\), which is no character: leave it out"),
        (b"\xff\xfea\x00", "is UTF-16 text: convert it to UTF-8"),
        (b" " * (LARGEST_FILE + 1), "which no such file has"),
    ],
)
def test_a_file_that_is_no_text_is_refused(tmp_path, content, said):
    (tmp_path / "file.yaml").write_bytes(content)
    with pytest.raises(UserError, match=said):
        read_mapping(tmp_path / "file.yaml", "such things")


def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path):
    (tmp_path / "file.yaml").write_bytes(b"\xef\xbb\xbfa: 1\n")
    assert read_mapping(tmp_path / "file.yaml", "such things") == {"a": 1}


@pytest.mark.parametrize(
    ("read", "key"),
    [
        (lambda path: read_config(["--config", str(path)]), "model"),
        (lambda path: read_cluster(["--cluster", str(path)]), "nodes"),
        (lambda path: run_status(path.parent), "training"),
    ],
    ids=["configuration", "cluster", "run folder"],
)
def test_every_reader_refuses_a_key_that_is_there_twice(tmp_path, read, key):
    path = tmp_path / "config.yaml"
    path.write_text(f"{key}: {{}}\n{key}: 2\n")
    with pytest.raises(UserError) as caught:
        read(path)
    assert f"{path} is not valid YAML: line 2: `{key}` is there already, in line 1" in str(caught.value)


def test_yaml_is_read_in_one_module_alone():
    from tests import REPOSITORY

    files = [*(REPOSITORY / "megatron_ponder").rglob("*.py"), *(REPOSITORY / "tools").glob("*.py")]
    calls = ("yaml.load(", "yaml.safe_load(", "yaml.safe_dump(", "yaml.dump(")
    users = [path.name for path in files if any(call in path.read_text(encoding="utf-8") for call in calls)]
    assert users == ["yaml_files.py"]
    assert yaml.safe_load("010") == 8  # which is why
