import itertools
import json
import math
import re
import shutil
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from megatron_ponder.checkpoint.load import load_model
from megatron_ponder.checkpoint.writer import write_weights_checkpoint
from megatron_ponder.data.dataset_manifest import read_dataset_manifest, write_dataset_manifest
from megatron_ponder.hf.export import export
from megatron_ponder.runs.metrics import read_metrics
from tests import REPOSITORY
from tests.finished_runs import LATEST, finished_runs
from tests.models import small_config, small_model

TOOL = REPOSITORY / "tools" / "evaluate.py"
EXAMPLES = TOOL.parents[1] / "examples" / "evaluation"
ROWS = ["soft, jacobi(0)", "soft, jacobi(3)", "soft, exact", "hard, jacobi(0)", "hard, jacobi(3)", "hard, exact"]


@pytest.fixture(scope="module")
def run_dir(corpus) -> Path:
    """A trained run."""
    return finished_runs(corpus).whole


@pytest.fixture
def tool(ponder):
    """Runs the command in this process: its exit code, what it printed, and its errors."""
    return partial(ponder, "evaluate")


@pytest.fixture
def evaluated(tool, run_dir, tmp_path):
    """The table that the tool prints and the rows that it writes, by name."""

    def evaluated(*arguments) -> tuple[str, dict[str, dict]]:
        output = tmp_path / "evaluation.json"
        code, out, error = tool("--checkpoint", run_dir, "--output", output, *arguments)
        assert (code, error) == (0, "")
        content = json.loads(output.read_text())
        assert content["checkpoint"] == LATEST
        given = dict(itertools.pairwise(arguments))
        assert content["threshold"] == float(given.get("--threshold", 0.1))
        assert content["data"] == (given["--text"].name if "--text" in given else content["data"])
        return out, {row["setting"]: row for row in content["evaluations"]}

    return evaluated


def test_the_validation_split(evaluated, run_dir):
    table, rows = evaluated("--samples", "6")
    assert list(rows) == ROWS
    assert f"{LATEST}: adaptive, 96 tokens" in table
    for name, row in rows.items():
        assert name in table
        assert f"{row['cross_entropy']:.4f}" in table
        assert f"{row['bits_per_byte']:.4f}" in table
        assert row["tokens"] == 6 * 16
        assert row["perplexity"] == pytest.approx(math.exp(row["cross_entropy"]))
        assert sum(row["step_shares"]) == pytest.approx(1)
        assert row["kv_entries"] == pytest.approx(1 + row["mean_steps"])
        assert row["mean_steps"] == 2 or name.startswith("hard")
    # training validated on the same six samples
    assert rows["soft, jacobi(3)"]["cross_entropy"] == pytest.approx(read_metrics(run_dir)[-1]["validation_loss"])


def test_a_text_file_with_settings_of_its_own(evaluated, corpus, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(corpus.text.read_text()[:600])
    table, rows = evaluated("--text", text, "--threshold", "1", "--refinements", "1", "--router-bias", "-1")
    assert list(rows) == ["soft, jacobi(1)", "soft, exact", "hard, jacobi(1)", "hard, exact"]
    assert rows["hard, exact"]["mean_steps"] == 0
    assert rows["hard, exact"]["step_shares"] == [1.0, 0.0, 0.0]
    assert "100.0% 0.0% 0.0%" in table
    row = rows["soft, exact"]
    assert row["bits_per_byte"] == pytest.approx(row["cross_entropy"] * row["tokens"] / math.log(2) / 600, rel=1e-6)
    _, all_steps = evaluated("--text", text, "--threshold", "0", "--refinements")
    assert list(all_steps) == ["soft, exact", "hard, exact"]
    # with no step pruned both rules see and fuse the same slots
    assert all_steps["hard, exact"]["cross_entropy"] == pytest.approx(all_steps["soft, exact"]["cross_entropy"])


def test_a_byte_order_mark_changes_nothing(evaluated, corpus, tmp_path):
    (tmp_path / "plain.txt").write_bytes(corpus.text.read_bytes()[:300])
    (tmp_path / "marked.txt").write_bytes(b"\xef\xbb\xbf" + corpus.text.read_bytes()[:300])
    rows = [evaluated("--text", tmp_path / name, "--refinements")[1] for name in ("plain.txt", "marked.txt")]
    assert rows[0] == rows[1]


def test_another_split_and_another_dataset(evaluated, corpus):
    _, train = evaluated("--split", "train", "--samples", "2")
    _, again = evaluated("--split", "train", "--samples", "2", "--data", corpus.dataset)
    _, valid = evaluated("--samples", "2")
    assert train == again != valid


def test_a_folder_without_tokenizer_and_data(tool, corpus, tmp_path):
    overrides = {"model__vocab_size": 512, "ponder__mode": "fixed"}
    weights = {name: parameter.detach() for name, parameter in small_model(**overrides).named_parameters()}
    config = small_config(**overrides, data__split="90,10")
    write_weights_checkpoint(tmp_path / "bare", weights, config, None)
    code, _, error = tool("--checkpoint", tmp_path / "bare")
    assert code == 2
    assert "names no dataset; evaluate on one with --data" in error
    code, _, error = tool("--checkpoint", tmp_path / "bare", "--text", corpus.text)
    assert code == 2
    assert "has no tokenizer to read" in error
    code, out, error = tool("--checkpoint", tmp_path / "bare", "--data", corpus.dataset, "--samples", "1")
    assert (code, error) == (0, "")
    assert "fixed" in out
    assert "–" in out
    assert "soft" not in out
    shares = {"entropy:0": " 0.0% 100.0% ", "entropy:inf": " 100.0% 0.0% 0.0% "}
    for exit, shown in shares.items():
        options = ["--data", corpus.dataset, "--samples", "1", "--confidence-exit", exit]
        code, out, error = tool("--checkpoint", tmp_path / "bare", *options)
        assert (code, error) == (0, "")
        assert [line for line in out.splitlines() if "hard, exact" in line and "100.0%" in line]
        assert [line for line in out.splitlines() if f"{exit}, exact" in line and shown in line]


@pytest.mark.parametrize(
    ("arguments", "problem", "remedy"),
    [
        (["--split", "test"], 'data.split "90,10,0" has no test part', "choose another --split, or --text"),
        (["--data", "no/such"], "no/such.bin does not exist", "ponder preprocess"),
        (["--text", "no/such.txt"], "No such file or directory (no/such.txt)", "check the path"),
        (["--samples", "0"], "samples is 0; its range is 1 to 1e12", "see --help"),
        (["--threshold", "-1"], "threshold is -1; its range is 0 to 1", "see --help"),
        (["--confidence-exit", "entropy"], "entropy:nan is no confidence exit", "choose entropy:X"),
        (["--confidence-exit", "margin:0.5"], "is for a model of mode fixed, not for one of mode adaptive", "leave it"),
        (["--confidence-exit", "margin:1", "--refinements", "2"], "is evaluated exactly", "leave out --refinements"),
        (["--tasks", "x", "--confidence-exit", "margin:1"], "does not go with --tasks", "in an --export"),
        (["--limit", "5"], "--limit and --num-fewshot go with --tasks", "name the tasks to run"),
        (["--tasks", "x", "--text", "README.md"], "do not go with --tasks", "run one command for each"),
        (["--tasks", "x", "--export", "out"], "on a --checkpoint or an --export", "give one of them"),
    ],
)
def test_mistakes_are_one_line(tool, run_dir, arguments, problem, remedy):
    code, out, error = tool("--checkpoint", run_dir, *arguments)
    assert (code, out) == (2, "")
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert problem in error
    assert remedy in error


def test_tasks_without_the_harness(tool, run_dir, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    code, out, error = tool("--checkpoint", run_dir, "--tasks", "arc_easy")
    assert (code, out) == (2, "")
    assert error.startswith("error: tasks need lm-evaluation-harness, which cannot be imported (")
    assert error.endswith("; run pip install -e '.[eval]'\n")


def test_an_export_and_settings_of_a_checkpoint(tool, tmp_path):
    code, _, error = tool("--export", tmp_path, "--tasks", "x", "--threshold", "0.5")
    assert code == 2
    assert "of an export, change ponder_threshold and ponder_router_bias in its config.json" in error
    code, _, error = tool("--text", tmp_path)
    assert code == 2
    assert "there is nothing to evaluate; give a --checkpoint" in error


def test_tasks(tool, run_dir, corpus, tmp_path, monkeypatch):
    """The shipped task on a trained run and on its export, which give the same."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    lines = [line for line in corpus.text.read_text().splitlines() if line.strip()]
    row = {"context": "\n".join(lines[:2]), "choices": lines[2:4], "answer": 0}
    (tmp_path / "data" / "stdlib_next_line.jsonl").write_text(json.dumps(row) + "\n")
    loaded = load_model(run_dir)
    weights = {name: parameter.detach() for name, parameter in loaded.model.named_parameters()}
    export(weights, loaded.config, corpus.tokenizer, tmp_path / "export")
    tasks = ["--tasks", "stdlib_next_line", "--tasks-path", EXAMPLES, "--output", tmp_path / "tasks.json"]
    got = []
    for source in (["--checkpoint", run_dir], ["--export", tmp_path / "export"]):
        code, out, _ = tool(*source, *tasks)
        assert code == 0
        assert "stdlib_next_line" in out
        got.append(json.loads((tmp_path / "tasks.json").read_text()))
        assert f"{got[-1]['checkpoint']}: lm-evaluation-harness" in out
    assert [content["checkpoint"] for content in got] == [LATEST, "export"]
    assert got[0]["tasks"] == got[1]["tasks"]
    assert [score["samples"] for score in got[0]["tasks"]] == [1, 1]


def test_text_that_is_not_utf8_and_a_dataset_that_is_too_large(tool, run_dir, corpus, tmp_path):
    (tmp_path / "latin1.txt").write_bytes("café".encode("latin-1"))
    code, _, error = tool("--checkpoint", run_dir, "--text", tmp_path / "latin1.txt")
    assert code == 2
    assert "is not UTF-8 text" in error
    code, _, error = tool("--checkpoint", run_dir, "--text", "/dev/zero")
    assert (code, error) == (2, "error: /dev/zero is a device: write what it gives to a file, and give that\n")

    small = {name: parameter.detach() for name, parameter in small_model().named_parameters()}
    write_weights_checkpoint(tmp_path / "small", small, small_config(data__split="90,10"), None)
    code, _, error = tool("--checkpoint", tmp_path / "small", "--data", corpus.dataset)
    assert code == 2
    assert "has token ids up to 511" in error

    prefix = tmp_path / "damaged"
    for ending in (".bin", ".idx"):
        shutil.copyfile(f"{corpus.dataset}{ending}", f"{prefix}{ending}")
    write_dataset_manifest(prefix, replace(read_dataset_manifest(corpus.dataset), bin_sha256="", fingerprint=""))
    Path(f"{prefix}.bin").write_bytes(b"\xff" * Path(f"{prefix}.bin").stat().st_size)
    code, _, error = tool("--checkpoint", run_dir, "--data", prefix)
    assert (code, error.count("\n")) == (2, 1)
    assert re.match(rf"error: sample 0 \(document .* of {prefix}\) has the token id 65535, and the model knows", error)
