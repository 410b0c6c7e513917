"""What is said of a long work where no terminal can show it."""

import re

import pytest

from megatron_ponder.base.errors import UserError
from megatron_ponder.data import progress
from megatron_ponder.data.tokenizer_training import train_tokenizer


@pytest.mark.parametrize("is_long", [True, False])
def test_training_a_tokenizer_says_how_far_it_is_if_it_takes_long(source_files, tmp_path, monkeypatch, capsys, is_long):
    if is_long:
        monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", -1)
    train_tokenizer(source_files[:4], tmp_path / "tokenizer", vocab_size=500)
    lines = capsys.readouterr().err.splitlines()
    if is_long:
        shares = [float(re.fullmatch(r"reading  (\d+\.\d) % of \d+\.\d MB", line)[1]) for line in lines[:-1]]
        assert len(shares) == 4 and shares == sorted(shares) and shares[0] < 100
        assert re.fullmatch(r"training 500 tokens on \d+\.\d MB of text", lines[-1])
    else:
        assert lines == []


def test_a_terminal_is_given_back_after_an_error(source_files, tmp_path, monkeypatch, capsys):
    """Of which rich takes the cursor while it shows something."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    with pytest.raises(UserError, match="the text allows at most"):
        train_tokenizer(source_files[:1], tmp_path / "tokenizer", vocab_size=60_000)
    shown = capsys.readouterr().err
    assert "training 60,000 tokens on" in shown
    assert shown.rindex("\x1b[?25h") > shown.rindex("\x1b[?25l")
