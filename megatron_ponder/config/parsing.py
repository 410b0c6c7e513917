"""From YAML files and dotted command-line overrides to a configuration, and back."""

import difflib
import functools
import warnings
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path

import yaml

from megatron_ponder.config.sections import Config, resolve
from megatron_ponder.config.validation import validate
from megatron_ponder.errors import UserError


def read_config(arguments: Sequence[str]) -> Config:
    """The resolved and validated configuration that a command line names.

    Args:
        arguments: `--config FILE.yaml` and any number of `--section.key value`; later ones win.

    Raises:
        UserError: on anything unknown, mistyped or contradictory. Every rank raises the same.
    """
    try:
        return validate(resolve(_parse(arguments)))
    except UserError as error:
        error.shared = True
        raise


def load_config(path: Path) -> Config:
    """The resolved configuration that a run folder or a checkpoint keeps as `config.yaml`."""
    return read_config(["--config", str(path)])


def to_yaml(config: Config) -> str:
    """The configuration as YAML that `read_config` accepts."""
    plain = asdict(config)
    plain["optimizer"]["betas"] = list(config.optimizer.betas)
    return yaml.safe_dump(plain, sort_keys=False)


def _parse(arguments: Sequence[str]) -> Config:
    """Type-checked parsing by jsonargparse, after our own look at the keys, whose message names the nearest one."""
    import argparse

    import jsonargparse

    arguments = list(arguments)
    for position, argument in enumerate(arguments):
        if argument == "--config" and position + 1 < len(arguments):
            _check_file(Path(arguments[position + 1]))
        elif argument.startswith("--config="):
            _check_file(Path(argument.partition("=")[2]))
        elif argument.startswith("--") and argument not in ("--help", "--config"):
            _check_key(argument[2:].partition("=")[0], "on the command line")
    parser = _parser()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # deprecations that jsonargparse announces to library authors
            namespace = parser.parse_args(arguments)
            sections = (parser.instantiate if hasattr(parser, "instantiate") else parser.instantiate_classes)(namespace)
    except (argparse.ArgumentError, jsonargparse.ArgumentError, TypeError, yaml.YAMLError) as error:
        raise UserError(_one_line(str(error))) from error
    return Config(**{section.name: getattr(sections, section.name) for section in fields(Config)})


@functools.cache
def _parser():
    import jsonargparse

    parser = jsonargparse.ArgumentParser(exit_on_error=False, description="Sections and keys, with their defaults:")
    parser.add_argument("--config", action="config", help="YAML file with any of the keys below.")
    parser.add_class_arguments(Config, nested_key=None, fail_untyped=True)
    return parser


def _one_line(message: str) -> str:
    return " ".join(message.replace("Parser key", "configuration key").split())


def _check_file(path: Path) -> None:
    """Refuse a configuration file that is missing, is no mapping, or has a key that no section knows."""
    if not path.is_file():
        raise UserError(f"there is no configuration file {path}; check the path given with --config")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid YAML: {_one_line(str(error))}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} must hold sections such as `model:` with keys below them")
    for section, keys in content.items():
        if not isinstance(keys, dict):
            _check_key(f"{section}", f"in {path}", section_only=True)
            raise UserError(f"section `{section}` in {path} must hold keys below it")
        for key in keys:
            _check_key(f"{section}.{key}", f"in {path}")


def _check_key(key: str, where: str, section_only: bool = False) -> None:
    """Refuse a dotted key, or a section, that does not exist, naming the nearest one that does."""
    keys = [f"{section.name}.{item.name}" for section in fields(Config) for item in fields(section.default_factory)]
    sections = [section.name for section in fields(Config)]
    names = sections if section_only else keys
    if key in names:
        return
    elsewhere = [name for name in keys if name.rpartition(".")[2] == key.rpartition(".")[2]]
    nearest = difflib.get_close_matches(key, elsewhere, n=1, cutoff=0) or difflib.get_close_matches(key, names, n=1)
    if nearest and section_only and "." in nearest[0]:
        hint = "put `{2}` below `{0}:`".format(*nearest[0].partition("."))
    else:
        hint = f"did you mean {nearest[0]}?" if nearest else f"sections are {', '.join(sections)}"
    raise UserError(f"unknown configuration {'section' if section_only else 'key'} {key} {where}; {hint}")
