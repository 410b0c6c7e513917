"""Scores of lm-evaluation-harness against the same computed by hand from PonderLM's own log-probabilities."""

import importlib
import json
import math
import os
import subprocess
import sys
import sysconfig
from itertools import takewhile
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from examples.evaluation.make_next_line import main as make_next_line
from megatron_ponder.base.errors import UserError
from megatron_ponder.checkpoint.load import LoadedModel, load_model
from megatron_ponder.checkpoint.writer import write_weights_checkpoint
from megatron_ponder.evaluation.harness import TaskEvaluation, TaskSet, evaluate_tasks, exported
from tests import REPOSITORY
from tests.models import small_config, small_model

SHIPPED = REPOSITORY / "examples" / "evaluation"
QUESTIONS = 12
ROLLING = """\
task: bits
dataset_path: json
dataset_kwargs: {data_files: {test: texts.jsonl}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: text
metric_list: [{metric: bits_per_byte}]
"""
GENERATING = """\
task: continued
dataset_path: json
dataset_kwargs: {data_files: {test: texts.jsonl}}
test_split: test
output_type: generate_until
doc_to_text: text
doc_to_target: continuation
generation_kwargs: {max_gen_toks: 6, do_sample: false, until: ["no such text"]}
metric_list: [{metric: exact_match}]
"""


@pytest.fixture(autouse=True)
def installed(monkeypatch):
    """The harness, which loads nothing from the network, and estimates errors in this process."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("DISABLE_MULTIPROC", "1")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Where commands run: the shipped task's data, made by its own script, and two small tasks more."""
    folder = tmp_path_factory.mktemp("harness")
    stdlib = Path(sysconfig.get_path("stdlib"))
    library = [stdlib / name for name in ("json/__init__.py", "runpy.py", "subprocess.py")]
    with (folder / "corpus.jsonl").open("w", encoding="utf-8") as out:
        out.writelines(json.dumps({"text": path.read_text(), "path": path.name}) + "\n" for path in library)
    arguments = ["--corpus", folder / "corpus.jsonl", "--output", folder / "data" / "stdlib_next_line.jsonl"]
    arguments += ["--split", "1,2", "--questions", QUESTIONS]
    make_next_line([*map(str, arguments)])
    (folder / "bits.yaml").write_text(ROLLING)
    (folder / "continued.yaml").write_text(GENERATING)
    return folder


def checkpoint_of(folder: Path, corpus, **options) -> Path:
    options = {"model__vocab_size": 512, "model__max_position_embeddings": 512, "inference__threshold": 0.3} | options
    weights = {
        name: tensor.detach().float() for name, tensor in small_model(router_scale=4.0, **options).named_parameters()
    }
    write_weights_checkpoint(folder, weights, small_config(**options), corpus.tokenizer)
    return folder


@torch.no_grad()
def log_probability(loaded: LoadedModel, context: list[int], continuation: list[int]) -> float:
    """Of a continuation, by parallel passes with the hard rule."""
    tokens = torch.tensor([context + continuation])
    refinements = loaded.config.ponder_training.evaluation_refinements
    result = loaded.model.jacobi(tokens[:, :-1], refinements, loaded.model.rule("hard"))
    scores = loaded.model.head(result.output_BLH)[0].double().log_softmax(-1)[len(context) - 1 :]
    return float(scores.gather(1, torch.tensor(continuation).unsqueeze(1)).sum())


def documents(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def by_hand(loaded: LoadedModel, questions: list[dict]) -> dict[str, float]:
    """Shares of questions whose right answer is the likeliest, whole and per character."""
    right = {"acc": 0, "acc_norm": 0}
    for question in questions:
        context = loaded.tokenizer.encode(question["context"])
        scores = []
        for choice in question["choices"]:
            whole = loaded.tokenizer.encode(f"{question['context']}\n{choice}")
            scores.append(log_probability(loaded, context, whole[len(context) :]))
        normed = [score / len(choice) for score, choice in zip(scores, question["choices"], strict=True)]
        right["acc"] += scores.index(max(scores)) == question["answer"]
        right["acc_norm"] += normed.index(max(normed)) == question["answer"]
    return {metric: count / len(questions) for metric, count in right.items()}


def values(evaluation: TaskEvaluation) -> dict[str, float]:
    return {score.metric: score.value for score in evaluation.tasks}


@pytest.mark.parametrize(
    "options",
    [
        {"model__num_kv_heads": 2},
        {"model__family": "gpt_neox", "ponder__mode": "fixed"},
        {"model__family": "gpt_neox", "inference__router_bias": -0.2},
        {"ponder__mode": "vanilla"},
    ],
)
def test_multiple_choice(options, folder, corpus, tmp_path, monkeypatch):
    monkeypatch.chdir(folder)
    loaded = load_model(checkpoint_of(tmp_path / "checkpoint", corpus, **options))
    tasks = TaskSet(["stdlib_next_line"], SHIPPED)
    with exported(tmp_path / "checkpoint") as export:
        evaluation = evaluate_tasks(export, tasks)
    expected = by_hand(loaded, documents(folder / "data" / "stdlib_next_line.jsonl"))
    assert values(evaluation) == pytest.approx(expected, abs=1e-12)
    assert 0 < expected["acc"] < 1
    counted = [(score.task, score.samples, score.shots) for score in evaluation.tasks]
    assert counted == [("stdlib_next_line", QUESTIONS, 0)] * 2
    assert evaluation.checkpoint == "checkpoint"
    vanilla = options.get("ponder__mode") == "vanilla"
    assert evaluation.setting == ("hard, exact" if vanilla else "hard, jacobi(3)")
    assert not export.exists()


def test_text_and_generation(folder, corpus, tmp_path, monkeypatch):
    """Bits per byte of whole texts, from their first token on, and greedy continuations by `generate`.

    What a random model says is no text: bytes that are no characters, the unknown piece, the end. The harness compares
    what the export's tokenizer makes of it, without special tokens.
    """
    monkeypatch.chdir(folder)
    loaded = load_model(checkpoint_of(tmp_path / "checkpoint", corpus))
    texts = ["import json", "def loads(s):\n    return s", "naïve 数据"]
    bits, continuations = 0.0, []
    for text in texts:
        ids = loaded.tokenizer.encode(text)
        bits -= log_probability(loaded, [loaded.tokenizer.eod_id], ids) / math.log(2)
        prompt = tokens = torch.tensor([loaded.tokenizer.encode(text)])
        for _ in range(6):
            exact = loaded.model.exact(tokens, loaded.model.rule("hard"))
            tokens = torch.cat([tokens, loaded.model.head(exact.output_BLH[:, -1:]).argmax(-1)], 1)
        ids = tokens[0, prompt.shape[1] :].tolist()
        continuations.append(list(takewhile(lambda token: token != loaded.tokenizer.eod_id, ids)))
    with exported(tmp_path / "checkpoint") as export:
        tokenizer = Tokenizer.from_file(str(export / "tokenizer.json"))
        rows = [
            {"text": text, "continuation": tokenizer.decode(ids)}
            for text, ids in zip(texts, continuations, strict=True)
        ]
        (folder / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        evaluation = evaluate_tasks(export, TaskSet(["bits", "continued"], folder), batch_size=2)
    size = sum(len(text.encode()) for text in texts)
    assert values(evaluation) == pytest.approx({"bits_per_byte": bits / size, "exact_match": 1.0}, rel=1e-5)


def test_settings(folder, corpus, tmp_path, monkeypatch):
    """A limit, examples before the questions, and another threshold and bias."""
    monkeypatch.chdir(folder)
    checkpoint = checkpoint_of(tmp_path / "checkpoint", corpus)
    tasks = TaskSet(["stdlib_*"], SHIPPED)
    with exported(checkpoint, threshold=0.9, bias=-1.0) as export:
        evaluation = evaluate_tasks(export, tasks, limit=5, shots=2)
        for numbers, said in [
            ({"limit": 0}, "--limit is 0; it must be at least 1"),
            ({"limit": 5, "shots": -1}, "--num-fewshot is -1; it must be at least 0"),
            ({"limit": 5, "batch_size": 0}, "--batch-size is 0; it must be at least 1"),
            ({"limit": 5, "shots": 10**6}, "lm-evaluation-harness refuses "),
        ]:
            with pytest.raises(UserError, match=said):
                evaluate_tasks(export, tasks, **numbers)
    assert (evaluation.threshold, evaluation.router_bias) == (0.9, -1.0)
    assert [(score.samples, score.shots) for score in evaluation.tasks] == [(5, 2)] * 2
    assert json.loads(json.dumps(evaluation.as_dict()))["tasks"][0]["samples"] == 5


def test_what_cannot_be_evaluated_is_refused(folder, corpus, tmp_path, monkeypatch):
    with monkeypatch.context() as few:  # two tasks of the harness's own in place of thousands, which take long to read
        arc = Path(importlib.import_module("lm_eval.tasks").__file__).parent / "arc"
        few.setattr("lm_eval.tasks.manager.__file__", str(arc / "manager.py"))
        assert "arc_easy" in TaskSet(["arc_easy"]).names
        with pytest.raises(UserError, match=r"no task stdlib_next_lin; did you mean stdlib_next_line"):
            TaskSet(["stdlib_next_lin"], SHIPPED)
    with pytest.raises(UserError, match=r"is not a folder; give the one that holds the \.yaml files"):
        TaskSet(["stdlib_next_line"], folder / "nowhere")
    tasks = TaskSet(["stdlib_next_line"], SHIPPED)
    bare = tmp_path / "bare"
    write_weights_checkpoint(bare, {}, small_config(), None)
    with pytest.raises(UserError, match="has no tokenizer to read tasks with"), exported(bare):
        pass
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(UserError, match="is no export of this package"):
        evaluate_tasks(tmp_path, tasks)
    with exported(checkpoint_of(tmp_path / "checkpoint", corpus)) as export:
        monkeypatch.chdir(tmp_path)
        for needs_data in (tasks.prepare, lambda: evaluate_tasks(export, tasks)):
            with pytest.raises(UserError, match=r"the data of stdlib_next_line cannot be loaded .*next_line\.jsonl"):
                needs_data()
        (export / "tokenizer.json").unlink()
        with pytest.raises(UserError, match=r"put its tokenizer\.json there"):
            evaluate_tasks(export, tasks)


@pytest.mark.slow
def test_the_harness_by_its_own_command(folder, corpus, tmp_path, monkeypatch):
    """As its users run it on an export, which needs nothing of this package."""
    monkeypatch.chdir(folder)
    checkpoint = checkpoint_of(tmp_path / "checkpoint", corpus)
    with exported(checkpoint) as export:
        ours = evaluate_tasks(export, TaskSet(["stdlib_next_line"], SHIPPED))
        model = f"pretrained={export},trust_remote_code=True"
        options = ["--tasks", "stdlib_next_line", "--include_path", SHIPPED, "--output_path", tmp_path / "out"]
        command = ["-m", "lm_eval", "--model", "hf", "--model_args", model, "--device", "cpu", *options]
        keep = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        done = subprocess.run(
            [sys.executable, *map(str, command)],
            env=keep | {"HF_MODULES_CACHE": str(tmp_path / "modules")},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
    (path,) = (tmp_path / "out").rglob("results_*.json")
    theirs = json.loads(path.read_text())["results"]["stdlib_next_line"]
    assert {metric: theirs[f"{metric},none"] for metric in ("acc", "acc_norm")} == values(ours)
