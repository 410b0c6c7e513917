import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from megatron_ponder.data.tokenizer import load_tokenizer

ROOT = Path(__file__).parents[2]
SOURCES = Path(sysconfig.get_paths()["stdlib"])


def run(*arguments):
    command = [sys.executable, str(ROOT / "tools" / "train_tokenizer.py"), *map(str, arguments)]
    return subprocess.run(command, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=60)


def test_the_tool_trains(tmp_path):
    prefix = tmp_path / "new" / "tokenizer"
    shutil.copytree(SOURCES / "json", tmp_path / "json", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "json" / "table.csv").touch()
    (tmp_path / "json" / "empty.txt").touch()
    result = run(
        *("--input", tmp_path / "json", SOURCES / "argparse.py", "--output-prefix", prefix),
        *("--vocab-size", 500, "--sample-bytes", 100_000),
    )
    told = ["warning: left out of folders: 1 × .csv", "warning: skipped: 1 × empty document"]
    assert (result.returncode, result.stderr.splitlines()) == (0, told)
    assert result.stdout == f"{prefix}.model: 500 tokens\n"
    tokenizer = load_tokenizer(f"{prefix}.model")
    text = (SOURCES / "abc.py").read_text()
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--input", "nowhere", "--vocab-size", "500"], "error: nowhere does not exist and matches no file: check"),
        (["--input", SOURCES / "abc.py", "--vocab-size", "99999"], "error: the text allows at most "),
        (["--input", SOURCES / "abc.py", "--vocab-size", "3"], "error: --vocab-size is 3: set it above 259"),
    ],
)
def test_mistakes_get_one_line(tmp_path, arguments, message):
    result = run(*arguments, "--output-prefix", tmp_path / "t")
    assert result.returncode == 2
    assert result.stderr.startswith(message)
    assert result.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_an_output_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    prefix = tmp_path / "file" / "tokenizer"
    result = run("--input", SOURCES / "argparse.py", "--vocab-size", 500, "--output-prefix", prefix)
    assert result.returncode == 2
    assert result.stderr.startswith(f"error: cannot make the folder {tmp_path / 'file'} (")
    assert result.stderr.count("\n") == 1
