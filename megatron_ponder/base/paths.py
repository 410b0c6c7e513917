"""Paths as they are given: ~ is the home folder, wherever one is read."""

import os
from pathlib import Path

from megatron_ponder.base.errors import UserError


def expand_user(text: str) -> str:
    """A path with the home folder in place of ~ or ~name at its beginning, as shells do.

    Raises:
        UserError: there is no such user, or it is not known where the home is.
    """
    expanded = os.path.expanduser(text)
    if text.startswith("~") and expanded.startswith("~"):
        raise UserError(f"{text}: it is not known where {text.split('/')[0]} is; write the path in full")
    return expanded


def user_path(text: str) -> Path:
    """A path as given on a command line, with ~ expanded."""
    return Path(expand_user(text))
