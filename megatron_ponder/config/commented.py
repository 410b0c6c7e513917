"""A configuration file for people: some keys, each below what is written about it where it is declared."""

import textwrap
from collections.abc import Iterable
from dataclasses import asdict, fields

from megatron_ponder.base.yaml_files import inline_yaml
from megatron_ponder.config.documentation import entries, plain
from megatron_ponder.config.sections import Config

_WIDTH = 100


def commented_yaml(config: Config, keys: Iterable[str], heading: str) -> str:
    """A YAML file of some keys of a configuration, which `read_config` reads.

    Args:
        config: resolved.
        keys: to write, each with its section.
        heading: comment at the beginning; may have several lines.
    """
    wanted, values = set(keys), asdict(config)
    lines = [f"# {line}".rstrip() for line in heading.splitlines()]
    for section in fields(Config):
        declared = section.default_factory
        shown = [entry for entry in entries(declared) if f"{section.name}.{entry.key}" in wanted]
        if not shown:
            continue
        lines += ["", f"# {plain(declared.__doc__.partition(chr(10))[0])}", f"{section.name}:"]
        for entry in shown:
            lines += [
                f"  # {line}" for line in textwrap.wrap(f"{plain(entry.meaning)}.", _WIDTH, break_on_hyphens=False)
            ]
            value = values[section.name][entry.key]
            lines.append(f"  {entry.key}: {inline_yaml(list(value) if isinstance(value, tuple) else value)}")
    return "\n".join(lines) + "\n"
