"""Run what pages show, and put what it prints now in the place of what they say it prints.

    python docs/refresh.py                               # README.md, which makes the run, then all pages
    python docs/refresh.py docs/inference.md --folder /tmp/pages
    python docs/refresh.py --house                       # what is drawn of the package, which takes a second

Two kinds of blocks are run: ```console blocks, in which lines with `$ ` are commands and the others their output, and
```python blocks that a ```text block follows at once, which is their output. Where an output is cut short by a line
`…`, as many lines are kept before and after it as before. Where a ```text house block is, the package is drawn, and
tables of the keys of a configuration are those that the package declares.

Commands run in a folder that has the repository's files, and the data and runs that earlier pages have made there.
"""

import argparse
import ast
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path

from megatron_ponder.base.errors import UserError, command
from megatron_ponder.base.files import make_folder, write_atomically
from megatron_ponder.config import Config
from megatron_ponder.config.documentation import key_table

REPOSITORY = Path(__file__).resolve().parents[1]
CUT = "…"
CONSOLE = re.compile(r"(?ms)(?<=^```console\n).*?(?=^```$)")
PYTHON = re.compile(r"(?ms)^```python\n(?P<code>(?:(?!^```).)*)^```\n\n```text\n(?P<output>.*?)^```$")
# A command, to the last line that it is continued on, and what it prints.
EXCHANGE = re.compile(r"(?m)^\$ (?P<command>(?:.*\\\n)*.*\n)(?P<output>(?:(?!\$ ).*\n)*)")
HOUSE = re.compile(r"(?ms)(?<=^```text house\n).*?(?=^```$)")
ABOVE = "pretrain_ponder.py   tools/*.py   three lines each: a command of the package as a file"
GROUND = "─" * 118
BESIDE = "tests/ mirrors the package   benchmarks/   examples/   docs/"
# A section of a configuration, down to the table of its keys, and that.
KEYS = re.compile(r"(?ms)^(?P<intro>## `(?P<section>\w+)`\n(?:(?!^## ).)*?)^\| key \| default (?:(?!^$).)*")
Run = Callable[[list[str], str | None], str]


def pages() -> list[Path]:
    """README.md and the pages of docs, in the order in which they build on each other."""
    return [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]


def exchanges(page: str) -> list[tuple[str, str]]:
    """Every command of a page's console blocks, with the output that the page shows."""
    found = (exchange for block in CONSOLE.findall(page) for exchange in EXCHANGE.finditer(block))
    return [(exchange["command"], exchange["output"]) for exchange in found]


def scripts(page: str) -> list[tuple[str, str]]:
    """Every Python block of a page that has its output below it, with that output."""
    return [(found["code"], found["output"]) for found in PYTHON.finditer(page)]


def refreshed(page: str, run: Run) -> str:
    """A page with its outputs replaced.

    Args:
        page: its text.
        run: gives what a process prints, of its command line and its standard input.
    """

    def answer(exchange: re.Match) -> str:
        said = run(["bash", "-c", exchange["command"]], None)
        return f"$ {exchange['command']}{shortened(said, exchange['output'])}"

    def follow(script: re.Match) -> str:
        said = shortened(run(["python", "-"], script["code"]), script["output"])
        return f"```python\n{script['code']}```\n\n```text\n{said}```"

    page = CONSOLE.sub(lambda block: EXCHANGE.sub(answer, block[0]), page)
    return drawn(PYTHON.sub(follow, page))


def drawn(page: str) -> str:
    """A page with the package drawn as it is, and the keys of a configuration as they are declared."""
    sections = {section.name: section.default_factory for section in fields(Config)}
    page = KEYS.sub(lambda found: found["intro"] + key_table(sections[found["section"]]), page)
    return HOUSE.sub(lambda block: house(), page)


def house() -> str:
    """Parts of the package from the top floor down, each with the first line of its docstring.

    The floors are those of the test that reads the imports, so that no drawing is of another house.
    """
    source = (REPOSITORY / "tests" / "test_imports.py").read_text(encoding="utf-8")
    floors = ast.literal_eval(re.search(r"(?ms)^FLOORS = (\[.*?^\])", source)[1])
    lines = [f"{part:<12}  {holds(part)}" for part in reversed(floors)]
    return "".join(f"{line}\n" for line in [ABOVE, GROUND, *lines, GROUND, BESIDE])


def holds(part: str) -> str:
    """What a part of the package holds, as the first line of its docstring says."""
    source = (REPOSITORY / "megatron_ponder" / part / "__init__.py").read_text(encoding="utf-8")
    return ast.get_docstring(ast.parse(source)).partition("\n")[0].rstrip(".")


def shortened(said: str, before: str) -> str:
    """What was said, cut where the output in the page is."""
    lines, shown = [line.rstrip() for line in said.rstrip().splitlines()], before.splitlines()
    if CUT in shown:
        first, last = shown.index(CUT), len(shown) - shown.index(CUT) - 1
        lines = [*lines[:first], CUT, *lines[len(lines) - last :]]
    return "".join(f"{line}\n" for line in lines)


def runner(folder: Path) -> Run:
    """Runs processes in a folder, on one thread and with this Python."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    search = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"PATH": path, "PYTHONPATH": search, "OMP_NUM_THREADS": "1", "COLUMNS": "120"}
    environment["BASH_FUNC_ponder%%"] = '() { python -m megatron_ponder "$@"; }'  # this package's, installed or not

    def run(words: list[str], given: str | None) -> str:
        done = subprocess.run(
            words, cwd=folder, env=environment, input=given or "", capture_output=True, text=True, check=False
        )  # fmt: skip
        # Libraries draw bars and warn on standard error; of what is there, pages show our own errors alone.
        errors = [line for line in done.stderr.splitlines(keepends=True) if line.startswith("error: ")]
        return "".join([done.stdout, *errors])

    return run


def link_repository(folder: Path) -> None:
    """Make the repository's files appear in a folder, but for the data and runs that are in it."""
    make_folder(folder)
    for path in REPOSITORY.iterdir():
        if path.name not in ("data", "runs") and not (folder / path.name).exists():
            (folder / path.name).symlink_to(path)


@command
def main(argv: Sequence[str]) -> None:
    """Refresh pages in place."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pages", nargs="*", type=Path, default=pages(), help="those to refresh; all unless given")
    parser.add_argument("--house", action="store_true", help="draw the house and the tables of keys, and run nothing")
    parser.add_argument("--folder", type=Path, help="where commands run; a temporary one unless given")
    arguments = parser.parse_args(argv)
    for page in arguments.pages:
        if not page.is_file():
            raise UserError(f"there is no page {page}; name pages as docs/inference.md")
    with tempfile.TemporaryDirectory() as scratch:
        folder = (arguments.folder or Path(scratch)).resolve()
        link_repository(folder)
        for page in arguments.pages:
            print(page)
            text = page.read_text(encoding="utf-8")
            write_atomically(page, drawn(text) if arguments.house else refreshed(text, runner(folder)))


if __name__ == "__main__":
    main()
