import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(tool, *arguments):
    command = [sys.executable, str(ROOT / "tools" / tool), *map(str, arguments)]
    return subprocess.run(command, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=60)


def test_merge_and_inspect(corpus, tmp_path):
    merged = run("merge_datasets.py", "--input", corpus.dataset, corpus.dataset, "--output-prefix", tmp_path / "both")
    assert (merged.returncode, merged.stderr) == (0, "")
    assert merged.stdout.startswith(f"{tmp_path / 'both'}: 60 documents, ")
    shown = run("inspect_dataset.py", tmp_path / "both", "--tokenizer", corpus.tokenizer, "--samples", 60, "--verify")
    assert (shown.returncode, shown.stderr) == (0, "")
    assert "version 1, tokens of type uint16" in shown.stdout
    assert "60 sequences, 60 documents, " in shown.stdout
    assert "vocabulary 512, end token 2" in shown.stdout
    first = corpus.text.read_text()[:20].split("\n")[0]
    assert f"tokens: {first}" in shown.stdout
    assert "checksums: .bin and .idx are the files that the manifest describes" in shown.stdout
    ids = run("inspect_dataset.py", tmp_path / "both", "--samples", 1, "--sample-tokens", 4)
    assert len(ids.stdout.splitlines()[-1].partition("tokens: ")[2].split()) == 5


@pytest.mark.parametrize(
    ("tool", "arguments", "message"),
    [
        ("inspect_dataset.py", ["nowhere"], "error: nowhere.bin does not exist"),
        ("inspect_dataset.py", ["nowhere", "--samples", "-1"], "error: --samples and --sample-tokens count"),
        ("merge_datasets.py", ["--input", "nowhere", "--output-prefix", "out"], "error: nowhere.bin does not exist"),
    ],
)
def test_mistakes_get_one_line(tool, arguments, message):
    result = run(tool, *arguments)
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)
    assert result.stderr.startswith(message)
