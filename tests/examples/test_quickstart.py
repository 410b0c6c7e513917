"""The quickstart replaces what it has made itself and nothing else, and its commands are those of the README."""

import shlex

import pytest

from docs.refresh import exchanges
from examples.quickstart.quickstart import COMMANDS, MADE, Made
from megatron_ponder.base.errors import UserError
from tests import REPOSITORY
from tests.finished_runs import contents


def make(folder, *names: str) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)


EVERYTHING = [name if "." in name else f"{name}/deep/file" for name in MADE]


@pytest.fixture
def made(tmp_path) -> Made:
    made = Made(tmp_path)
    with made.noted():
        make(tmp_path, *EVERYTHING)
    return made


def test_what_it_has_made_is_replaced_and_the_rest_is_left(made, tmp_path):
    make(tmp_path, "data/own.jsonl", "runs/own/file")
    assert made.remove() == list(MADE)
    assert contents(tmp_path).keys() == {"data/own.jsonl", "runs/own/file", "runs/quickstart.json"}
    assert made.remove() == []


@pytest.mark.parametrize(
    "name", ["data/tokenizer.model", "runs/quickstart/deep/file", "runs/quickstart/evaluation.json"]
)
def test_what_somebody_else_has_put_there_or_changed_is_named_and_nothing_is_lost(made, tmp_path, name):
    (tmp_path / name).write_text("of somebody else")
    before = contents(tmp_path)
    with pytest.raises(UserError, match=f"{tmp_path / name} is in the way, .* by --folder FOLDER"):
        made.remove()
    assert contents(tmp_path) == before


def test_a_link_is_not_followed(made, tmp_path):
    make(tmp_path, "elsewhere/file")
    (tmp_path / "runs" / "export" / "link").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="runs/export/link is in the way"):
        made.remove()
    with made.noted():
        pass
    made.remove()
    assert (tmp_path / "elsewhere" / "file").is_file()


def test_what_a_step_leaves_that_fails_is_replaced_too(tmp_path):
    made = Made(tmp_path)

    def fail() -> None:
        with made.noted():
            make(tmp_path, EVERYTHING[0])
            raise UserError("no space")

    with pytest.raises(UserError, match="no space"):
        fail()
    assert made.remove() == [MADE[0]]


def test_its_commands_are_those_of_the_readme():
    section = (
        (REPOSITORY / "README.md").read_text(encoding="utf-8").split("## The first ten minutes")[1].split("\n## ")[0]
    )
    shown = [shlex.split(line.replace("\\\n", "")) for line, _ in exchanges(section)]
    assert shown == [shlex.split(line) for line in COMMANDS.values()]
