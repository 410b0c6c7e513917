import csv
import json
from pathlib import Path

import pytest

from megatron_ponder.checkpoint.writer import write_weights_checkpoint
from megatron_ponder.data.diagnostic import VOCABULARY, write_corpus
from megatron_ponder.data.preprocessing import preprocess
from megatron_ponder.evaluation.figures import FIGURES
from tests import REPOSITORY
from tests.finished_runs import finished_runs
from tests.models import small_config, small_model

TOOL = REPOSITORY / "tools" / "analyze_pondering.py"
QUICK = ["--samples", "6", "--refinements", "1", "--thresholds", "0.5", "--biases", "1", "--random-draws", "1"]
QUICK += ["--entropies", "1", "--margins", "0.5"]


@pytest.fixture(scope="module")
def run_dir(corpus) -> Path:
    """A trained run."""
    return finished_runs(corpus).whole


@pytest.fixture
def tool(ponder, tmp_path):
    """Runs the command in this process: its exit code, what it printed, its errors, and the folder that it wrote."""

    def tool(*arguments) -> tuple[int, str, str, Path]:
        return *ponder("analyze", *arguments, "--output", tmp_path / "analysis"), tmp_path / "analysis"

    return tool


@pytest.fixture(scope="module")
def diagnostic(tmp_path_factory):
    """The diagnostic corpus as a dataset, and a model of each mode for it, by mode."""
    folder = tmp_path_factory.mktemp("diagnostic")
    kinds = ["copy", "sum", "compose", "match"]  # a question of these has one depth
    made = write_corpus(folder / "text", documents=40, questions=4, max_depth=2, kinds=kinds)
    dataset = preprocess([made.text], folder / "corpus", made.tokenizer, append_eod=True).prefix
    checkpoints = {}
    for mode in ("adaptive", "fixed", "vanilla"):
        options = {
            "model__vocab_size": len(VOCABULARY),
            "ponder__mode": mode,
            "inference__threshold": 0.3,
            "data__path": dataset,
            "data__split": "50,50",
            "data__sequence_length": 20,
        }
        weights = {name: parameter.detach() for name, parameter in small_model(**options).named_parameters()}
        checkpoints[mode] = folder / mode
        write_weights_checkpoint(folder / mode, weights, small_config(**options), made.tokenizer)
    return made, checkpoints


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_a_trained_run(tool, run_dir, corpus, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(corpus.text.read_text()[:400])
    code, out, error, output = tool("--checkpoint", run_dir, "--text", text, *QUICK[2:], "--listed", "50")
    assert (code, error) == (0, "")
    assert "hard, jacobi(1)" in out
    drawn = set(FIGURES) - {"depth"}
    tables = {*drawn, "tokens", "token_strings"}
    written = {f"{name}.{ending}" for name in drawn for ending in ("png", "svg")} | {f"{name}.csv" for name in tables}
    assert {path.name for path in output.iterdir()} == {*written, "analysis.json", "index.html"}
    content = json.loads((output / "analysis.json").read_text())
    assert content["data"] == "text.txt"
    (summary,) = content["models"].values()
    assert summary["checkpoint"].endswith("step-00000008")
    tokens = rows(output / "tokens.csv")
    assert len(tokens) == 50 < summary["tokens"]
    assert corpus.text.read_text()[:40] in "".join(row["token"] for row in tokens[1:]).replace("▁", " ").replace(
        "\\n", "\n"
    )
    assert "Text shaded by executed steps: whole" in (output / "index.html").read_text()


def test_several_modes_and_depths(tool, diagnostic):
    made, checkpoints = diagnostic
    code, out, error, output = tool("--checkpoint", *checkpoints.values(), "--depths", made.depths, *QUICK)
    assert (code, error) == (0, "")
    assert "fixed: not shown: sweeps, steps by difficulty and shifts of the router: mode fixed has no router" in out
    content = json.loads((output / "analysis.json").read_text())
    assert content["data"] == "the valid part of corpus_text_document"
    assert list(content["models"]) == ["adaptive", "fixed", "vanilla"]
    assert (output / "depth.svg").is_file()
    sweeps = {(row["model"], row["sweep"]) for row in rows(output / "quality_compute.csv")}
    trained = {(mode, "trained") for mode in ("fixed", "vanilla")}
    assert {sweep for sweep in sweeps if sweep[0] != "adaptive"} == trained | {
        ("fixed", "entropy"),
        ("fixed", "margin"),
    }

    # the depths that the table counts are those of the tokens that it is about, found in the text again
    words = [
        word
        for line in made.text.read_text().splitlines()[20:]  # the validation half
        for word in [*json.loads(line)["text"].split(), "</s>"]
    ]
    depths, answering, terms, kind = [], False, 0, ""
    for word in words:
        if word in ("copy", "sum", "compose", "match"):
            kind, terms, pairs, answering = word, 0, 0, False
            depths.append("")
        elif word in ("=", ";", "</s>"):
            answering = word == "="
            depths.append("")
        elif answering:
            depths.append(str({"copy": 0, "match": pairs}.get(kind, terms - 1)))
        else:
            terms, pairs = terms + 1, pairs + (word in ")]}")
            depths.append("")
    measured = depths[1 : 1 + 6 * 20]
    found = {row["depth"]: int(row["tokens"]) for row in rows(output / "depth.csv") if row["model"] == "fixed"}
    assert found == {depth: measured.count(depth) for depth in sorted(set(measured))}
    assert len(found) == 4


def test_labels_of_checkpoints_of_one_run(tool, run_dir):
    checkpoints = [run_dir / "checkpoints" / name for name in ("step-00000004", "step-00000008", "step-00000008")]
    code, _, error, output = tool("--checkpoint", *checkpoints, "--samples", "1", *QUICK[2:])
    assert (code, error) == (0, "")
    labels = ["whole/step-00000004", "whole/step-00000008 (1)", "whole/step-00000008 (2)"]
    summary = json.loads((output / "analysis.json").read_text())["models"]
    assert list(summary) == labels
    assert summary[labels[1]]["loss"] == summary[labels[2]]["loss"] != summary[labels[0]]["loss"]


def test_mistakes_are_one_line(tool, run_dir, diagnostic, corpus):
    made, checkpoints = diagnostic
    for arguments, problem, remedy in (
        ([run_dir, "--split", "test"], 'data.split "90,10,0" has no test part', "choose another --split, or --text"),
        ([run_dir, "--samples", "0"], "samples is 0; its range is 1 to 1e12", "see --help"),
        ([run_dir, "--depths", made.depths], "depths has 40 documents", "give the depths that were made with"),
        ([run_dir, "--text", corpus.text, "--depths", made.depths], "--depths belong to a dataset", "leave out --text"),
        ([run_dir, checkpoints["fixed"]], "have different tokenizers", "analyse them one by one"),
        ([run_dir, "--thresholds", "2", "--samples", "1"], "thresholds is 2; its range is 0 to 1", "see --help"),
        ([run_dir, "--device", "cuda:99"], "--device cuda:99 cannot be used here", "choose cpu"),
        ([run_dir, "--device", "toaster"], "--device toaster cannot be used here", "choose cpu"),
    ):
        code, out, error, _ = tool("--checkpoint", *arguments)
        assert (code, out) == (2, ""), arguments
        assert error.startswith("error: ")
        assert error.count("\n") == 1
        assert problem in error
        assert remedy in error
