import shutil
import sysconfig
from functools import partial
from pathlib import Path

import pytest

from megatron_ponder.data.tokenizer import load_tokenizer

SOURCES = Path(sysconfig.get_paths()["stdlib"])


@pytest.fixture
def run(ponder):
    """Runs the command in this process."""
    return partial(ponder, "train-tokenizer")


def test_the_tool_trains(run, tmp_path):
    prefix = tmp_path / "new" / "tokenizer"
    shutil.copytree(SOURCES / "json", tmp_path / "json", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "json" / "table.csv").touch()
    (tmp_path / "json" / "empty.txt").touch()
    result = run(
        *("--input", tmp_path / "json", SOURCES / "argparse.py", "--output-prefix", prefix),
        *("--vocab-size", 500, "--sample-bytes", 100_000),
    )
    told = ["warning: left out of folders: 1 × .csv", "warning: skipped: 1 × empty document"]
    assert (result.code, result.err.splitlines()) == (0, told)
    assert result.out == f"{prefix}.model: 500 tokens\n"
    tokenizer = load_tokenizer(f"{prefix}.model")
    text = (SOURCES / "abc.py").read_text()
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--input", "nowhere", "--vocab-size", "500"], "error: nowhere does not exist and matches no file; check"),
        (["--input", SOURCES / "abc.py", "--vocab-size", "99999"], "error: the text allows at most "),
        (["--input", SOURCES / "abc.py", "--vocab-size", "3"], "error: --vocab-size is 3; set it above 259"),
    ],
)
def test_mistakes_get_one_line(run, tmp_path, arguments, message):
    result = run(*arguments, "--output-prefix", tmp_path / "t")
    assert result.code == 2
    assert result.err.startswith(message)
    assert result.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_an_output_that_cannot_be_written(run, tmp_path):
    (tmp_path / "file").touch()
    prefix = tmp_path / "file" / "tokenizer"
    result = run("--input", SOURCES / "argparse.py", "--vocab-size", 500, "--output-prefix", prefix)
    assert result.code == 2
    assert result.err.startswith(f"error: cannot make the folder {tmp_path / 'file'} (")
    assert result.err.count("\n") == 1
