"""A version outside the declared ranges is named before a command does its work, and refuses nothing."""

import pytest
from packaging.version import Version

from megatron_ponder.base import versions
from megatron_ponder.base.errors import command


@command
def succeed(argv) -> None:
    """Does nothing."""


@pytest.fixture
def installed(monkeypatch, tmp_path):
    """Installs this package's metadata with these requirements, beside the real packages."""

    def install(*requirements: str) -> None:
        folder = tmp_path / "megatron_ponder-0.1.0.dist-info"
        folder.mkdir()
        lines = ["Metadata-Version: 2.1", "Name: megatron_ponder", "Version: 0.1.0", "Provides-Extra: data"]
        lines += ["Provides-Extra: dev", *(f"Requires-Dist: {requirement}" for requirement in requirements)]
        (folder / "METADATA").write_text("\n".join(lines) + "\n")
        monkeypatch.syspath_prepend(tmp_path)

    return install


def test_versions_within_their_ranges_are_not_mentioned(installed, capsys):
    installed("torch<99,>=1", "no-such-package>=3", 'pytest<1; extra == "dev"', 'numpy<99; extra == "data"')
    assert versions.outside() == []
    succeed()
    assert capsys.readouterr() == ("", "")


def test_others_are_named_in_one_line_and_work_goes_on(installed, monkeypatch, capsys):
    installed("torch<1.1,>=1.0", 'numpy>=99; extra == "data"', 'numpy>=99; extra == "dev"')
    torch, numpy = versions.outside()
    assert Version(torch.split()[1]) > Version("1.1")
    assert (torch.endswith(" (tested: >=1.0,<1.1)"), numpy.endswith(" (tested: >=99)")) == (True, True)
    succeed()
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"warning: {torch}, {numpy}: outside the versions that the tests ran on; ")
    assert err.count("\n") == 1
    monkeypatch.setenv("RANK", "1")  # rank 0 has said it
    succeed()
    assert capsys.readouterr() == ("", "")


def test_a_source_tree_that_is_not_installed_has_no_ranges(monkeypatch):
    monkeypatch.setattr(versions, "PACKAGE", "a-package-that-is-not-installed")
    assert versions.outside() == []
