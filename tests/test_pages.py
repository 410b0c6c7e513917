"""Pages lead where they say, can all be reached, and show what commands print now."""

import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from docs.refresh import drawn, exchanges, link_repository, pages, refreshed, runner, scripts, shortened
from megatron_ponder import __version__
from megatron_ponder.commands.ponder import COMMANDS
from tests import REPOSITORY
from tests.finished_runs import finished_runs
from tests.pages import calls
from tests.processes import Forked

EVERY_PAGE = [*pages(), *sorted((REPOSITORY / "examples").rglob("*.md")), *REPOSITORY.glob("CHANGELOG.md")]
# Options that make a command of a page take seconds on a tiny model.
SMALLER = {
    "ponder train --config examples/quickstart/adaptive.yaml\n": " --training.steps 4 --training.eval_interval 2"
    " --checkpoint.interval 2 --logging.interval 1 --training.run_dir runs/anew --model.hidden_size 16"
    " --model.ffn_hidden_size 32 --model.num_layers 1 --data.sequence_length 16 --training.eval_samples 2",
    "ponder train-tokenizer ": " --sample-bytes 400000",
    "--tasks ": " --limit 2",
}
QUICK = ("README", "configuration")


def links(page: Path) -> list[tuple[str, str]]:
    """File and heading of every relative link of a page; a link without a file leads to the page itself."""
    text = re.sub(r"(?ms)^```.*?^```", "", page.read_text(encoding="utf-8"))
    targets = re.findall(r"\]\(([^)\s]+)\)", text)
    return [tuple(target.partition("#")[::2]) for target in targets if not re.match(r"\w+:", target)]


def headings(page: Path) -> set[str]:
    """Names by which links lead to the headings of a page."""
    titles = re.findall(r"(?m)^#+ (.*)$", re.sub(r"(?ms)^```.*?^```", "", page.read_text(encoding="utf-8")))
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", EVERY_PAGE, ids=lambda page: page.relative_to(REPOSITORY).as_posix())
def test_every_link_leads_somewhere(page):
    for file, heading in links(page):
        target = (page.parent / file).resolve() if file else page
        target = target / "README.md" if target.is_dir() and heading else target
        assert target.exists(), file
        assert not heading or heading in headings(target), f"{file}#{heading}"


def test_every_page_can_be_reached_from_the_readme():
    reached, ahead = set(), [REPOSITORY / "README.md"]
    while ahead:
        page = ahead.pop()
        reached.add(page)
        targets = ((page.parent / file).resolve() for file, _ in links(page) if file.endswith(".md"))
        ahead += [target for target in targets if target not in reached]
    assert set(EVERY_PAGE) <= reached


# The laboratory book names files of then.
OF_TODAY = [page for page in EVERY_PAGE if page.name != "lab.md"]


@pytest.mark.parametrize("page", OF_TODAY, ids=lambda page: page.relative_to(REPOSITORY).as_posix())
def test_every_python_file_that_a_page_names_is_there(page):
    named = re.findall(r"(?<![\w/.:~$*-])((?:[\w-]+/)*[\w-]+\.py)\b", page.read_text(encoding="utf-8"))
    folders = (REPOSITORY, REPOSITORY / "megatron_ponder", page.parent)
    files = {path.name for folder in folders[:2] for path in folder.glob("*/*.py")}
    lost = [name for name in named if name not in files and not any((folder / name).is_file() for folder in folders)]
    assert not lost


def test_every_page_is_in_the_list_of_the_readme():
    listed = (REPOSITORY / "README.md").read_text(encoding="utf-8").split("## Documentation")[1]
    for page in (REPOSITORY / "docs").glob("*.md"):
        assert f"](docs/{page.name})" in listed


@pytest.mark.parametrize("page", EVERY_PAGE, ids=lambda page: page.relative_to(REPOSITORY).as_posix())
def test_commands_that_a_page_names_are_there(page):
    named = {call.words[0] for call in calls("ponder", (page,))}
    named |= set(re.findall(r"`ponder ([a-z][\w-]*)", page.read_text(encoding="utf-8")))
    assert named <= {*COMMANDS, "COMMAND", "--help", "--version", "--completion"}


@pytest.mark.parametrize("page", ["README.md", "docs/development.md"])
def test_the_house_is_drawn_as_it_is_built(page):
    text = (REPOSITORY / page).read_text(encoding="utf-8")
    assert "```text house" in text
    assert drawn(text) == text, "python docs/refresh.py --house"


def test_a_page_is_refreshed():
    page = "a\n\n```console\n$ first \\\n    more\nold\n$ second\n1\n…\n9\n```\n\n"
    page += "```python\nprint(1)\n```\n\n```text\n0\n```\n"
    said = {"bash": "new\n", "python": "1\n"}
    asked = []

    def run(words: list[str], given: str | None) -> str:
        asked.append((words[-1], given))
        return "1\n2\n3\n4  \n" if "second" in words[-1] else said[words[0]]

    assert refreshed(page, run) == page.replace("old", "new").replace("…\n9", "…\n4").replace("\n0\n", "\n1\n")
    assert asked == [("first \\\n    more\n", None), ("second\n", None), ("-", "print(1)\n")]
    assert shortened("", "") == ""


@pytest.fixture(scope="module")
def folder(corpus, tmp_path_factory) -> Path:
    """The repository's files, and a tiny run and its data where the quickstart makes them."""
    folder = tmp_path_factory.mktemp("pages")
    link_repository(folder)
    shutil.copytree(finished_runs(corpus).whole, folder / "runs" / "quickstart")
    return folder


def shape(line: str) -> str:
    """A line without what differs from run to run: numbers, widths of columns, and the model's words."""
    line = re.sub(r"; \d+ are kept", "", line)
    line = re.sub(r"(def main\(argv\):|latent steps:|import os|\"text\":) .*", r"\1", line)
    line = re.sub(r"(def main\(argv\):|import os|class A).*", r"\1", line)
    line = re.sub(r"[-–+]?\d[\d,.:]*(e[-+]?\d+)?|nan|∞", "0", line)
    line = re.sub(r"0–0|\b0 ?(ms|s|min|h|d|days)\b", "0", line)
    line = re.sub(r"\[0(, 0)*\]|(?<=\s)0%(\s+0%)*(?=\s)", "[0]", line)
    return re.sub(r"[━─]+", "─", re.sub(r"\s+", "", line))


def shown_and_printed() -> list:
    """Every command of a page that shows what it prints, in the order of the pages."""
    cases = []
    for page in pages():
        name = page.relative_to(REPOSITORY).as_posix()
        for command, output in exchanges(page.read_text(encoding="utf-8")):
            marks = () if page.stem in QUICK else pytest.mark.slow
            cases.append(pytest.param(command, output, id=f"{name}: {command.splitlines()[0][:60]}", marks=marks))
    return cases


def printed_by(command: str, folder: Path) -> str:
    """What a command prints, and its own errors; a plain `ponder` without the seconds that imports take."""
    _, *words = shlex.split(command.replace("\\\n", " "))
    if not command.startswith("ponder ") or {"|", ">", "&", "$"} & set(command):
        return runner(folder)(["bash", "-c", command], None)
    with (folder / "errors").open("w+") as errors:
        env = os.environ | {"COLUMNS": "120"}
        out, _ = Forked(*words, cwd=folder, env=env, stdout=subprocess.PIPE, stderr=errors).communicate(300)
    said = (folder / "errors").read_text().splitlines(keepends=True)
    return "".join([out, *(line for line in said if line.startswith("error: "))])


@pytest.mark.parametrize(("command", "output"), shown_and_printed())
def test_commands_print_lines_of_the_kind_that_the_page_shows(folder, command, output):
    for of, smaller in SMALLER.items():
        if of in command:
            command = command.rstrip("\n") + smaller + "\n"
    said = printed_by(command, folder).replace("runs/anew", "runs/quickstart")
    printed = {shape(line) for line in said.splitlines()}
    missing = [line for line in output.splitlines() if line != "…" and shape(line) not in printed]
    assert not missing, said


@pytest.mark.slow
@pytest.mark.parametrize(
    ("code", "output"),
    [pytest.param(*script, id=page.name) for page in pages() for script in scripts(page.read_text(encoding="utf-8"))],
)
def test_python_of_a_page_prints_as_many_lines_as_it_shows(folder, code, output):
    said = runner(folder)(["python", "-"], code)
    assert len(said.splitlines()) == len(output.splitlines())


def test_the_version_is_the_same_wherever_it_stands():
    citation = yaml.safe_load((REPOSITORY / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    assert citation["version"] == __version__
    changes = (REPOSITORY / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.findall(r"(?m)^## ([\d.]+)", changes)[0] == __version__
