"""The page for those who come from other programs names keys that there are, the same as an unknown option is told."""

import re
from collections.abc import Iterator

import pytest

from megatron_ponder.config import read_config
from megatron_ponder.config.other_names import NAMES, nearest_key
from megatron_ponder.config.parsing import KEYS, SECTIONS
from tests import REPOSITORY
from tests.pages import calls

PAGE = REPOSITORY / "docs" / "from_megatron.md"
OURS = re.compile(rf"(?<!\w)(?:{'|'.join(SECTIONS)})\.(?!md|py|png)\w+")


def rows() -> Iterator[tuple[list[str], str]]:
    """What others call something, word by word, and what stands beside it."""
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        if line.startswith("| `"):
            theirs, _, ours = line.strip("| ").partition(" | ")
            words = re.findall(r"`([^`]+)`", theirs)
            yield [word.split()[0].lstrip("-").rpartition(".")[2].replace("-", "_") for word in words], ours


def test_every_key_that_the_page_names_is_there():
    text = PAGE.read_text(encoding="utf-8")
    outside = re.sub(r"(?m)^\| `.*$", "", text)
    named = {key for part in (outside, *(ours for _, ours in rows())) for key in OURS.findall(part)}
    assert len(named) > 70
    assert named <= set(KEYS)


def test_the_page_says_what_an_unknown_option_is_told():
    known = {name for names in NAMES.values() for name in names}
    compared = 0
    for theirs, ours in rows():
        keys = OURS.findall(ours)
        for name in theirs:
            if name in known and keys:
                assert nearest_key(name, KEYS) in keys, name
                compared += 1
    assert compared > 60


@pytest.mark.parametrize("call", calls("ponder torchrun", (PAGE,)), ids=str)
def test_the_command_of_their_script_is_a_configuration(call, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    config = read_config(call.words[call.words.index("train") + 1 :])
    assert (config.ponder.mode, config.ponder.latent_steps) == ("fixed", 1)
    assert config.training.global_batch_size == 256
    assert config.optimizer.learning_rate == 2e-4
