"""The scripts of jobs on two real nodes: what they compute is what one process computes."""

import json
from pathlib import Path

import pytest

from tests.cluster.runs import TWO_BY_TWO, losses, one_process, succeed
from tests.finished_runs import contents, tiny_arguments

pytestmark = pytest.mark.cluster


@pytest.fixture(scope="module")
def alone(corpus, tmp_path_factory) -> Path:
    """A run of one process."""
    run = tmp_path_factory.mktemp("alone") / "run"
    one_process(tiny_arguments(corpus, run))
    return run


@pytest.mark.parametrize("job", ["train", pytest.param("train-torchrun", marks=pytest.mark.slow)])
def test_training_on_both_nodes(submit, cluster, corpus, alone, tmp_path, job):
    output = succeed(cluster, submit(job, *tiny_arguments(corpus, tmp_path / "run", **TWO_BY_TWO)))
    assert "4 ranks: 2 tensor × 2 data × 1 pipeline" in output
    assert "command not found" not in output
    assert losses(tmp_path / "run") == pytest.approx(losses(alone), rel=1e-5)


def test_preprocessing_on_both_nodes(submit, cluster, corpus, tmp_path):
    texts = tmp_path / "texts"
    texts.mkdir()
    for number, path in enumerate(sorted(corpus.text.parent.glob("*.py"))[:12]):
        (texts / f"{number}.py").write_bytes(path.read_bytes())
    arguments = ["--input", texts, "--tokenizer", corpus.tokenizer, "--append-eod"]
    one_process([*arguments, "--output-prefix", tmp_path / "one" / "corpus"], "tools/preprocess_data.py")
    output = succeed(cluster, submit("preprocess", *arguments, "--output-prefix", tmp_path / "two" / "corpus"))
    assert contents(tmp_path / "two") == contents(tmp_path / "one")
    assert len(contents(tmp_path / "two")) == 3
    assert "12 documents" in output


@pytest.mark.slow
def test_one_node_then_an_evaluation(submit, cluster, corpus, alone, tmp_path):
    run, figures = tmp_path / "run", tmp_path / "evaluation.json"
    training = submit("train-one-node", *tiny_arguments(corpus, run))
    evaluation = submit("evaluate", "--checkpoint", run, "--samples", 4, "--output", figures, after=training)
    assert cluster.job(evaluation)["Dependency"].startswith(f"afterok:{training}")
    succeed(cluster, training)
    assert not figures.exists()
    succeed(cluster, evaluation)
    assert losses(run) == pytest.approx(losses(alone), rel=1e-5)
    one_process(["--checkpoint", run, "--samples", 4, "--output", tmp_path / "again.json"], "tools/evaluate.py")
    assert json.loads(figures.read_text()) == json.loads((tmp_path / "again.json").read_text())
