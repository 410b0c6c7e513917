"""The command lines of commands: argparse, with what all of them have in common."""

import argparse
import difflib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn

import megatron_ponder
from megatron_ponder.base.errors import UserError
from megatron_ponder.base.paths import expand_user, user_path


class Parser(argparse.ArgumentParser):
    """The parser of a command, with `--version`, in whose paths (`type=Path`, or `expand_user` for text) ~ is expanded.

    Options have to be written in full. What cannot be is a `UserError`, and for an unknown option it names those that
    there are.

    Args:
        name: of the command, after `ponder`.
        description: the docstring of its module, shown as it stands.
        lacking: options that people look for and the command has not, with what to do without each.
    """

    def __init__(self, name: str, description: str | None = None, lacking: Mapping[str, str] = MappingProxyType({})):
        super().__init__(
            prog=f"ponder {name}",
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        self.register("type", Path, _explaining(user_path))
        self.register("type", expand_user, _explaining(expand_user))
        self.add_argument("--version", action="version", version=version_line())
        self._lacking = lacking

    def parse_args(self, args: Sequence[str], namespace: Any = None) -> argparse.Namespace:
        """Parse as argparse does, but look for options that do not exist before any that is missing."""
        self._check_names(args, lambda name: True)
        return super().parse_args(args, namespace)

    def parse_with_overrides(self, args: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
        """What is for the command, and the rest, which overrides keys of a configuration: their names have a point."""
        self._check_names(args, lambda name: "." not in name)
        return self.parse_known_args(args)

    def error(self, message: str) -> NoReturn:
        """Say what is wrong in one line.

        Raises:
            UserError: always, the same on every rank.
        """
        raise UserError(f"{message}; see --help", shared=True)

    def _check_names(self, arguments: Sequence[str], concerned: Callable[[str], bool]) -> None:
        """Refuse an option that there is not, with those that there are."""
        known = [option for option in self._option_string_actions if option.startswith("--")]
        for argument in arguments[: arguments.index("--")] if "--" in arguments else arguments:
            name = argument.partition("=")[0]
            if name in self._lacking:
                self.error(f"there is no option {name}: {self._lacking[name]}")
            # As argparse has it, what has a space is a value.
            if name.startswith("--") and name not in known and " " not in argument and concerned(name):
                near = difflib.get_close_matches(name.replace("_", "-"), known, n=1)
                there = f"did you mean {near[0]}? There" if near else "there"
                self.error(f"there is no option {name}; {there} are {', '.join(known)}")


def version_line() -> str:
    """What `--version` shows."""
    return f"ponder {megatron_ponder.__version__}"


def _explaining(convert: Callable[[str], Any]) -> Callable[[str], Any]:
    """A conversion whose refusals argparse shows in their own words."""

    def converted(text: str) -> Any:
        try:
            return convert(text)
        except UserError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return converted
