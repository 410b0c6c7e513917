"""Whether what is installed lies within the ranges that the tests ran on, which `setup.py` alone declares."""

import importlib.metadata

from packaging.requirements import Requirement

PACKAGE = "megatron_ponder"


def outside() -> list[str]:
    """Installed packages whose version is outside its range, as "torch 2.15.0 (tested: >=2.11,<2.14)".

    The ranges are those of this package's own metadata; a source tree that is not installed has none. Packages that
    are not installed, and those for development alone, are passed over.
    """
    try:
        declared = importlib.metadata.requires(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        return []
    found = {}
    for requirement in map(Requirement, declared):
        for_development = requirement.marker is not None and requirement.marker.evaluate({"extra": "dev"})
        version = None if for_development else _installed(requirement.name)
        if version is not None and not requirement.specifier.contains(version, prereleases=True):
            found[requirement.name] = f"{requirement.name} {version} (tested: {_ordered(requirement)})"
    return list(found.values())


def _installed(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _ordered(requirement: Requirement) -> str:
    """The range with its lower end first, as `setup.py` has it."""
    return ",".join(sorted(map(str, requirement.specifier), reverse=True))
