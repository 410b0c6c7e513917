"""What `setup.py` installs: every file of the package, and the command."""

import importlib.util
from importlib.metadata import EntryPoint

import pytest
import setuptools

from megatron_ponder.commands import ponder
from tests import REPOSITORY


@pytest.fixture
def declared(monkeypatch) -> dict:
    """What `setup.py` gives to setuptools."""
    given = {}
    monkeypatch.setattr(setuptools, "setup", given.update)
    monkeypatch.chdir(REPOSITORY)
    spec = importlib.util.spec_from_file_location("declared_setup", REPOSITORY / "setup.py")
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    return given


def test_every_file_of_the_package_is_installed(declared):
    package = REPOSITORY / "megatron_ponder"
    files = {path for path in package.rglob("*") if path.is_file() and "__pycache__" not in path.parts}
    folders = {name: REPOSITORY.joinpath(*name.split(".")) for name in declared["packages"]}
    installed = {path for folder in folders.values() for path in folder.glob("*.py")}
    for name, patterns in declared["package_data"].items():
        installed |= {path for pattern in patterns for path in folders[name].glob(pattern)}
    assert files == installed
    assert package / "cluster" / "scripts" / "train.sh" in installed


def test_the_command_is_the_entry_point(declared):
    (script,) = declared["entry_points"]["console_scripts"]
    name, _, target = script.partition(" = ")
    assert name == "ponder"
    assert EntryPoint(name, target, "console_scripts").load() is ponder.start
