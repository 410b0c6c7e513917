"""Checks of what a run is evaluated on, and of blends; every message says what to write instead."""

import re

from megatron_ponder.base.errors import UserError
from megatron_ponder.config.data import SPLITS, BlendPart
from megatron_ponder.config.run import TasksConfig
from megatron_ponder.config.sections import Config


def validate_evaluation(config: Config) -> None:
    """Refuse validation sets that cannot be told apart or name nothing, and tasks that are none.

    Raises:
        UserError: for the first contradiction found.
    """
    _validate_sets(config.data.validation)
    _validate_tasks(config.tasks)


def validate_blend(name: str, blend: list[BlendPart] | str) -> None:
    """Refuse a blend that names a dataset twice, or one without a path.

    Args:
        name: key of the blend.
        blend: in the form of a configuration.

    Raises:
        UserError: for the first contradiction found.
    """
    if isinstance(blend, str):
        # What is written on a command line and is no blend arrives as it was written.
        _require(
            not blend.startswith("["),
            f"{name} {blend} is not a blend; write [{{path: PREFIX, weight: NUMBER}}, ...], with split: if needed",
        )
        return
    paths = [part.path for part in blend]
    for part in blend:
        _require(bool(part.path), f"{name} has a dataset without a path; give it the path of a .bin file less .bin")
        _require(paths.count(part.path) == 1, f"{name} names {part.path} more than once; add the weights up")


def _validate_sets(sets: dict[str, list[BlendPart] | str]) -> None:
    for name, blend in sets.items():
        _require(
            re.fullmatch(r"[A-Za-z0-9_-]{1,64}", name) is not None,
            f'data.validation has a set of the name "{name[:80]}"; names are made of 1 to 64 letters, digits, _ and -',
        )
        others = [*SPLITS, *(other for other in sets if other != name)]
        same = next((other for other in others if other.lower() == name.lower()), None)
        _require(
            same is None,
            f"data.validation has a set of the name {name}, which cannot be told from {same}; give it another name",
        )
        _require(bool(blend), f"data.validation.{name} has no path; give it one")
        validate_blend(f"data.validation.{name}", blend)


def _validate_tasks(tasks: TasksConfig) -> None:
    for name in tasks.names:
        _require(
            re.fullmatch(r"[^\s,-][^\s,]*", name) is not None,
            f'tasks.names has "{name[:80]}", which is no name of a task; write a list such as [arc_easy, hellaswag]',
        )
    given = [name for name in ("path", "limit", "num_fewshot") if getattr(tasks, name) is not None]
    _require(
        bool(tasks.names) or not given,
        f"tasks.{''.join(given[:1])} means nothing without tasks.names; name tasks there, or leave it out",
    )


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)
