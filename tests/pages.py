"""The commands that pages of the documentation tell a reader to type, word by word."""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from tests import REPOSITORY

PAGES = (REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md")))
# What stands for something of the reader's own on a page, and something of ours that can stand there.
PLACEHOLDERS = {
    "FILE.yaml": "examples/configs/llama_410m.yaml",
    "cluster.yaml": "examples/slurm/cluster.yaml",
    "runs/quickstart/config.yaml": "examples/quickstart/adaptive.yaml",
    "run.yaml": "examples/configs/llama_410m.yaml",
    "runs/short/config.yaml": "examples/configs/llama_410m.yaml",
    "runs/start/config.yaml": "examples/quickstart/adaptive.yaml",
    "$mode": "adaptive",
}


@dataclass(frozen=True)
class Call:
    """A program that a page starts.

    Attributes:
        page: the page's file.
        line: number of the line in which the command begins.
        words: what follows the program, as the shell gives it on; `$name` where a variable stands, since it has no
            value here, and of a pipe or a substitution only this program's part.
        answer: the line below the command, which may be the first that it prints.
    """

    page: Path
    line: int
    words: tuple[str, ...]
    answer: str

    def __str__(self) -> str:
        return f"{self.page.stem}:{self.line}"

    def filled_in(self) -> list[str]:
        """The words, with ours in place of what is the reader's own."""
        return [PLACEHOLDERS.get(word, word) for word in self.words]


def commands(page: Path) -> list[tuple[int, str, str]]:
    """Every shell command of a page, continued lines joined: the number of its first line, itself, the line below.

    In blocks of `bash` and `sh` each line is one, in others those that begin with `$ `.
    """
    found = []
    for block in re.finditer(r"(?ms)^```(\w*)\n(.*?)^```", text := page.read_text(encoding="utf-8")):
        first = text.count("\n", 0, block.start(2)) + 1
        shell, number, lines = block.group(1) in ("bash", "sh"), first, block.group(2).splitlines()
        while lines:
            begin, line = number, lines.pop(0)
            number += 1
            while line.endswith("\\") and lines:
                line = line[:-1] + lines.pop(0).strip()
                number += 1
            if (shell and line.strip()) or line.startswith("$ "):
                found.append((begin, line.removeprefix("$ "), lines[0] if lines else ""))
    return found


def calls(program: str, pages: tuple[Path, ...] = PAGES) -> list[Call]:
    """Every start of a program on pages, such as of `ponder submit`."""
    begun, found = program.split(), []
    for page in pages:
        for line, command, answer in commands(page):
            words = _words(command)
            for at in range(len(words) - len(begun) + 1):
                if words[at : at + len(begun)] == begun:
                    rest = words[at + len(begun) :]
                    end = next((place for place, word in enumerate(rest) if set(word) <= set("()|;&<>")), len(rest))
                    found.append(Call(page, line, tuple(rest[:end]), answer))
    return found


def _words(command: str) -> list[str]:
    """What a shell would see, each operator a word of its own; a comment is none."""
    lexer = shlex.shlex(command, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    return list(lexer)
