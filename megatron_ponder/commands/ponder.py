"""The one entry point: `ponder COMMAND ...`, where each command is a module of this folder with its `main`.

A command's one line in the help is the first line of its module's docstring.
"""

import ast
import difflib
import importlib
from collections.abc import Sequence
from pathlib import Path

from megatron_ponder.base.command_line import version_line
from megatron_ponder.base.ending import run_to_the_end
from megatron_ponder.base.errors import UserError, command, command_line

# Commands by what people do; a command `some-name` is the module `some_name`.
GROUPS = {
    "data": ("train-tokenizer", "preprocess", "merge", "inspect-dataset", "build-index"),
    "training": ("new", "estimate", "train", "status", "inspect-checkpoint", "average"),
    "using a model": ("inspect", "generate", "serve", "evaluate", "analyze", "import-hf", "export-hf"),
    "clusters": ("submit", "torchrun"),
}
COMMANDS = [name for names in GROUPS.values() for name in names]


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command that the first word names, with the other words.

    Args:
        argv: the words of a command line; those of this process unless given.
    """
    words = command_line(argv)
    if words and words[0] in COMMANDS:
        # Alone, since some take seconds to import.
        importlib.import_module(f"megatron_ponder.commands.{module_of(words[0])}").main(words[1:])
    else:
        _answer(words)


def start() -> None:
    """Run the command line of this process, as the whole of its work."""
    run_to_the_end(main)


def module_of(name: str) -> str:
    """The name of a command's module."""
    return name.replace("-", "_")


def line_of(name: str) -> str:
    """What a command does, from the source of its module, which is not imported."""
    source = Path(__file__).with_name(f"{module_of(name)}.py").read_text(encoding="utf-8")
    return ast.get_docstring(ast.parse(source)).partition("\n")[0].rstrip(".")


@command
def _answer(words: Sequence[str]) -> None:
    """Answer a command line that names no command."""
    first = words[0] if words else "--help"
    if first in ("-h", "--help"):
        print("usage: ponder COMMAND ...\n")
        for group, names in GROUPS.items():
            print(f"{group}:", *(f"  {name:<20}{line_of(name)}" for name in names), sep="\n", end="\n\n")
        print("`ponder COMMAND --help` says what a command takes, `ponder --version` which version this is, and")
        print('`eval "$(ponder --completion)"` completes commands and options in your shell.')
    elif first == "--version":
        print(version_line())
    elif first == "--completion":
        script = Path(__file__).with_name("completion.bash").read_text(encoding="utf-8")
        print(script.replace("COMMANDS", " ".join(COMMANDS)), end="")
    else:
        near = difflib.get_close_matches(first.replace("_", "-"), COMMANDS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"commands are {', '.join(COMMANDS)}"
        raise UserError(f"there is no command {first}; {hint}")
