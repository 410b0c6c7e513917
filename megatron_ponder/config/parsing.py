"""From YAML files and dotted command-line overrides to a configuration, and back."""

import functools
import sys
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, get_args

from megatron_ponder.base.errors import UserError, warn
from megatron_ponder.base.paths import user_path
from megatron_ponder.base.typed_arguments import content_of, options_of, parse, parser_of, type_of, wanted
from megatron_ponder.base.whole_numbers import LONGEST_NUMBER
from megatron_ponder.base.yaml_files import dump_yaml, read_mapping
from megatron_ponder.config.blends import (
    read_blend,
    read_phases,
    read_ramp,
    read_sets,
    read_split,
    read_training_phases,
)
from megatron_ponder.config.checks import validate
from megatron_ponder.config.declarations import check_ranges, expand_paths, range_of
from megatron_ponder.config.documentation import help_text
from megatron_ponder.config.other_names import VALUES, nearest_key
from megatron_ponder.config.renamed import RENAMED, check_names, current, notice
from megatron_ponder.config.sections import Config, resolve
from megatron_ponder.config.training_phases import check_phases

SECTIONS = {section.name: [item.name for item in fields(section.default_factory)] for section in fields(Config)}
KEYS = [f"{section}.{key}" for section, keys in SECTIONS.items() for key in keys]
RANGES = {
    f"{section.name}.{item.name}": range_of(item)
    for section in fields(Config)
    for item in fields(section.default_factory)
    if range_of(item) is not None
}
# Options that stand alone: they print something in place of a run.
PRINT_CONFIG = "--print_config"
_ALONE = ("help", "version")
# Keys with more than one way of writing them.
_FORMS = {
    **dict.fromkeys(("data.path", "data.valid_path", "data.test_path"), read_blend),
    "data.phases": read_phases,
    "training.phases": read_training_phases,
    "training.batch_size_ramp": read_ramp,
    "data.validation": read_sets,
    "data.split": read_split,
}


def read_config(arguments: Sequence[str]) -> Config:
    """The resolved and validated configuration that a command line names.

    `--help`, `--version` and `--print_config`, which shows that configuration, end the process. Keys under names that
    they had before are read, with a warning.

    Args:
        arguments: `--config FILE.yaml` and any number of `--section.key value`; later ones win.

    Raises:
        UserError: on anything unknown, mistyped or contradictory. Every rank raises the same.
    """
    wanted = [argument for argument in arguments if argument != PRINT_CONFIG]
    config, old = _read(wanted)
    if old:
        warn(notice(old))
    if len(wanted) < len(arguments):
        print(to_yaml(config), end="")
        sys.exit(0)
    return config


def written_values(arguments: Sequence[str]) -> dict[str, Any]:
    """Values that a command line and its files write, by dotted keys; nothing that is left out, and nothing derived.

    `--help` and `--version` end the process.

    Args:
        arguments: as of `read_config`.

    Raises:
        UserError: on anything unknown or mistyped. Every rank raises the same.
    """
    try:
        rewritten, given = _rewritten([argument for argument in arguments if argument != PRINT_CONFIG])
        config = expand_paths(parse(_parser(), Config, rewritten))
    except UserError as error:
        error.shared = True
        raise
    keys = (current(name, value)[0].split(".") for name, value in given.items())
    return {f"{section}.{name}": getattr(getattr(config, section), name) for section, name in keys}


def load_config(path: Path) -> Config:
    """The resolved configuration that a run folder or a checkpoint keeps as `config.yaml`."""
    return _read(["--config", str(path)])[0]


def to_yaml(config: Config) -> str:
    """The configuration as YAML that `read_config` accepts."""
    plain = asdict(config)
    plain["optimizer"]["betas"] = list(config.optimizer.betas)
    return dump_yaml(plain)


@functools.cache
def _parser():
    return parser_of("train", Config, "--config")


def _read(arguments: Sequence[str]) -> tuple[Config, list[str]]:
    """The configuration, and the keys that were given under old names."""
    try:
        rewritten, named = _rewritten(arguments)
        given = expand_paths(parse(_parser(), Config, rewritten))
        check_ranges(given)  # before other fields are derived from what may be nonsense
        return check_phases(validate(resolve(given))), [key for key in named if key in RENAMED]
    except UserError as error:
        error.shared = True
        raise


def _rewritten(arguments: Sequence[str]) -> tuple[list[str], dict[str, object]]:
    """The arguments with names and values that are known, and files by their content; and what is given, as named."""
    rewritten, given = [], {}
    for name, value in options_of(["--help" if argument == "-h" else argument for argument in arguments], _ALONE):
        if name == "help":
            print(help_text(), end="")
            sys.exit(0)
        elif value is None:
            rewritten.append(f"--{name}")
        elif name == "config":
            path = user_path(value)
            content = _read_file(path)
            rewritten.append(f"--config={content_of(_by_section(content, f'in {path}'))}")
            given |= content
        else:
            key, value = current(name, value)
            _check_key(key, "on the command line")
            rewritten.append(f"--{key}={_option(key, value)}")
            given[name] = value
    return rewritten, given


def _option(key: str, value: str) -> str:
    if value is None:
        return "null"
    _check_value(key, value)
    read = _FORMS[key](key, value) if key in _FORMS else value
    return read if isinstance(read, str) else dump_yaml(read)


def _read_file(path: Path) -> dict[str, object]:
    """Values by dotted keys, as a configuration file has them; refused where it is no such file."""
    if not path.is_file():
        raise UserError(f"there is no configuration file {path}; check the path given with --config")
    content = read_mapping(path, "sections such as `model:` with keys below them")
    for section, keys in content.items():
        if not (keys and isinstance(keys, dict)):
            _check_section(f"{section}", f"in {path}")
        if not isinstance(keys, dict):
            raise UserError(f"section `{section}` in {path} must hold keys below it")
    return {f"{section}.{key}": value for section, keys in content.items() for key, value in keys.items()}


def _by_section(values: dict[str, object], where: str) -> dict[str, dict]:
    """Values by section and key as they are called now, refused where a key or a value is unknown."""
    check_names(values, where)
    sections: dict[str, dict] = {}
    for name, value in (current(*item) for item in values.items()):
        _check_key(name, where)
        _check_value(name, value)
        section, _, key = name.partition(".")
        sections.setdefault(section, {})[key] = _FORMS[name](name, value) if name in _FORMS else value
    return sections


def _check_key(key: str, where: str) -> None:
    """Refuse a dotted key that does not exist, naming the one that is meant."""
    if key in KEYS:
        return
    nearest = nearest_key(key, KEYS)
    hint = f"did you mean {nearest}?" if nearest else f"sections are {', '.join(SECTIONS)}; --help lists their keys"
    raise UserError(f"unknown configuration key {key} {where}; {hint}")


def _check_section(name: str, where: str) -> None:
    """Refuse a section that does not exist, naming the one that is meant, or where the key of that name belongs."""
    if name in SECTIONS:
        return
    nearest = nearest_key(name, [*SECTIONS, *KEYS])
    hint = f"did you mean {nearest}?" if nearest else f"sections are {', '.join(SECTIONS)}"
    if nearest and "." in nearest:
        hint = "put `{2}` below `{0}:`".format(*nearest.partition("."))
    raise UserError(f"unknown configuration section {name} {where}; {hint}")


def _check_value(key: str, value: object) -> None:
    """Refuse a value that has another name here or a reason not to be here, nothing, and a number that none can be."""
    kind = type_of(Config, key)
    if value is None and type(None) not in get_args(kind):  # a key of a file with nothing behind it
        raise UserError(f"{key} is null; write {wanted(kind)}, or leave it out")
    reason = VALUES.get(key, {}).get(str(value))
    if reason is not None:
        raise UserError(f"{key} is {value}: {reason}")
    if key in RANGES and isinstance(value, str) and len(value) > LONGEST_NUMBER and value.lstrip("-+").isdigit():
        raise UserError(f"{key} is a number of {len(value):,} digits; its range is {RANGES[key]}")
