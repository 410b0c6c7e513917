import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from functools import partial
from pathlib import Path

import pytest

from megatron_ponder.data.indexed_dataset import IndexedDataset
from megatron_ponder.data.tokenizer import load_tokenizer
from megatron_ponder.data.tokenizer_training import train_tokenizer
from tests import REPOSITORY

SOURCES = Path(sysconfig.get_paths()["stdlib"])


@pytest.fixture
def run(ponder):
    """Runs the command in this process."""
    return partial(ponder, "preprocess")


@pytest.fixture(scope="module")
def tokenizer_path(tmp_path_factory):
    return train_tokenizer([SOURCES / "argparse.py"], tmp_path_factory.mktemp("t") / "tokenizer", 500).path


def test_the_tool_preprocesses(run, tokenizer_path, tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "one"}) + "\n" + json.dumps({"body": "two"}) + "\n")
    shutil.copytree(SOURCES / "json", tmp_path / "json", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "json" / "table.csv").touch()
    result = run(
        *("--input", tmp_path / "*.jsonl", tmp_path / "json", "--output-prefix", tmp_path / "new" / "data"),
        *("--tokenizer", tokenizer_path.parent, "--workers", 2, "--append-eod"),
    )
    assert (result.code, result.err) == (0, "warning: left out of folders: 1 × .csv\n")
    prefix = tmp_path / "new" / "data_text_document"
    dataset, tokenizer = IndexedDataset(prefix), load_tokenizer(tokenizer_path)
    assert dataset.read(0).tolist() == [*tokenizer.encode("one"), tokenizer.eod_id]
    sources = sorted((SOURCES / "json").rglob("*.py"))
    for number, path in enumerate(sources, start=1):
        assert tokenizer.decode(dataset.read(number)[:-1].tolist()) == path.read_text()
    assert f"{len(sources) + 1} documents, {dataset.num_tokens:,} tokens" in result.out
    assert "bytes per token" in result.out
    assert "skipped: 1 × no text in 'text'" in result.out
    assert sorted(path.suffix for path in prefix.parent.iterdir()) == [".bin", ".idx", ".json"]


@pytest.mark.parametrize(
    ("replaced", "message"),
    [
        ({"--tokenizer": "nowhere.model"}, "error: nowhere.model does not exist; give a tokenizer, or make one with"),
        ({"--input": "nowhere"}, "error: nowhere does not exist and matches no file; check --input"),
        ({"--input": "/dev/zero"}, "error: /dev/zero is a device: write what it gives to a file, and give that"),
        (
            {"--input": REPOSITORY / "Makefile"},
            f"error: {REPOSITORY}/Makefile has no ending that says what it is (.txt, ",
        ),
        ({"--workers": "0"}, "error: argument --workers: workers is 0; its range is 1 to 10,000"),
        (
            {"--output-prefix": REPOSITORY / "pyproject.toml" / "data"},
            f"error: cannot make the folder {REPOSITORY}/pyproject.toml (",
        ),
    ],
)
def test_mistakes_get_one_line(run, tokenizer_path, tmp_path, replaced, message):
    options = {"--input": SOURCES / "json", "--output-prefix": tmp_path / "data", "--tokenizer": tokenizer_path}
    result = run(*(word for option in {**options, **replaced}.items() for word in option))
    assert result.code == 2
    assert result.err.startswith(message)
    assert result.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for processes in /proc")
def test_workers_end_with_a_killed_parent(tokenizer_path, tmp_path):
    (tmp_path / "a.txt").write_text((SOURCES / "argparse.py").read_text() * 300)
    options = ("--output-prefix", tmp_path / "data", "--tokenizer", tokenizer_path, "--workers", "2")
    process = subprocess.Popen(
        [sys.executable, REPOSITORY / "tools" / "preprocess_data.py", "--input", tmp_path / "a.txt", *options],
        env={"PYTHONPATH": str(REPOSITORY)},
        start_new_session=True,
    )
    try:
        wait_until(lambda: len(session_members(process.pid)) == 4)  # with Python's own resource tracker
        process.kill()
        process.wait()
        wait_until(lambda: not session_members(process.pid))
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def session_members(session: int) -> list[str]:
    """Processes of a session that have not ended."""
    members = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, _, number = path.read_text().rpartition(")")[2].split()[:4]
            if int(number) == session and state != "Z":
                members.append(path.parent.name)
    return members


def wait_until(condition, seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)
