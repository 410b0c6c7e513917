"""Public tasks in the course of a run, by a stand-in for `ponder evaluate`, and by the command itself."""

import json
import sys
import time
from pathlib import Path
from unittest import mock

import pytest
import torch.distributed as dist

from megatron_ponder.base.errors import Preempted
from megatron_ponder.config import read_config
from megatron_ponder.evaluation.harness import TaskSet, evaluate_tasks, exported
from megatron_ponder.parallel.mesh import Mesh
from megatron_ponder.runs.metrics import read_metrics
from megatron_ponder.runs.run_log import RUN_LOG
from megatron_ponder.training.trainer import train
from tests.distributed import run_distributed
from tests.finished_runs import refused, tiny_arguments, undrawn

# Scores are the number in the name of the checkpoint; a file beside the script says what goes wrong.
STAND_IN = """\
#!{python} -S
import json, os, sys, time
words = sys.argv[1:]
here = os.path.dirname(os.path.abspath(__file__))
with open(here + "/calls", "a") as calls:
    calls.write(json.dumps([words, sorted(set(os.environ) & {{"RANK", "WORLD_SIZE", "MASTER_ADDR"}})]) + "\\n")
trouble = open(here + "/trouble").read() if os.path.exists(here + "/trouble") else ""
if "--prepare" in words:
    sys.exit(0)
if trouble == "slow":
    open(here + "/begun", "w").close()
    time.sleep(600)
if trouble:
    print("warning: nothing\\nerror: " + trouble, file=sys.stderr)
    sys.exit(2)
folder = words[words.index("--checkpoint") + 1]
assert os.path.exists(folder + "/manifest.json")
value = int(folder[-8:]) / 10
scores = [dict(task="next line", metric=metric, value=value) for metric in ("acc", "match (strict)")]
with open(words[words.index("--output") + 1], "w") as out:
    json.dump(dict(tasks=scores), out)
"""
TASKS = {"tasks__names": "[next_line]", "tasks__interval": 3}
FIELDS = ["tasks/next_line/acc", "tasks/next_line/match_strict"]


@pytest.fixture
def stand_in(tmp_path) -> Path:
    path = tmp_path / "bin" / "evaluate"
    path.parent.mkdir()
    path.write_text(STAND_IN.format(python=sys.executable))
    path.chmod(0o755)
    return path


class Told:
    """A signal that arrives while tasks are evaluated, on one rank."""

    created = time.monotonic()

    def __init__(self, begun: Path | None) -> None:
        self._begun = begun

    @property
    def received(self) -> str | None:
        return "SIGUSR1" if self._begun is not None and self._begun.exists() else None


def trained(mesh: Mesh, stand_in: Path, commands: list[list[str]], troubles: list[str]) -> list[str]:
    """How runs have ended, of which the stand-in has these troubles."""
    ends = []
    for command, trouble in zip(commands, troubles, strict=True):
        if dist.get_rank() == 0:
            stand_in.with_name("trouble").write_text(trouble)
            stand_in.with_name("begun").unlink(missing_ok=True)
        dist.barrier()
        last = dist.get_rank() == dist.get_world_size() - 1
        signals = Told(stand_in.with_name("begun") if last else None)
        with undrawn(), mock.patch.object(sys, "executable", str(stand_in)):
            try:
                train(read_config(command), mesh.device, signals)
                ends.append("finished")
            except Preempted as stop:
                ends.append(stop.reason)
    return ends


def scores(run: Path) -> dict[int, list[float]]:
    return {
        record["step"]: [record[name] for name in FIELDS] for record in read_metrics(run) if not FIELDS - record.keys()
    }


def test_a_run_evaluates_tasks_on_what_it_saves_and_goes_on_whatever_happens(corpus, tmp_path, stand_in):
    """On two ranks; a round that a signal on the second cuts off is made up for."""
    settings = {"training__steps": 4, "training__eval_interval": 0, "checkpoint__interval": 4, **TASKS}
    good, bad, cut = (
        tiny_arguments(corpus, tmp_path / name, checkpoint__resume="auto", tasks__limit=5, **settings)
        for name in ("good", "bad", "cut")
    )
    troubles = ["", "it fails", "slow", ""]
    ends = run_distributed(trained, 2, stand_in, [good, bad, cut, cut], troubles, time_limit=240)
    assert ends == [["finished", "finished", "SIGUSR1", "finished"]] * 2
    assert scores(tmp_path / "good") == scores(tmp_path / "cut") == {3: [0.3, 0.3], 4: [0.4, 0.4]}
    assert scores(tmp_path / "bad") == {}
    assert [record["step"] for record in read_metrics(tmp_path / "cut")] == [1, 2, 3, 4]
    log = (tmp_path / "good" / RUN_LOG).read_text()
    assert "step 4  next line acc 0.4000, next line match (strict) 0.4000 (" in log
    log = (tmp_path / "bad" / RUN_LOG).read_text()
    assert log.count("warning: tasks not evaluated, training goes on: it fails") == 2
    calls = [json.loads(line) for line in stand_in.with_name("calls").read_text().splitlines()]
    assert {tuple(known) for _, known in calls} == {()}
    words = ["-m", "megatron_ponder", "evaluate", "--tasks", "next_line"]
    checkpoint, results = (tmp_path / "good" / folder / "step-00000003" for folder in ("checkpoints", "tasks"))
    options = ["--checkpoint", checkpoint, "--output", f"{results}.json", "--limit", 5, "--batch-size", 8]
    assert [call for call, _ in calls[:2]] == [[*words, "--prepare"], [*words, *map(str, options)]]


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["--tokenizer.path=", "--model.vocab_size=512"], "tasks.names needs a tokenizer to read tasks with; set"),
        (["--ponder.router_input=token"], "tasks.names cannot be used with ponder.router_input token, a control that"),
        (["--tasks.names=[-x]"], 'tasks.names has "-x", which is no name of a task; write a list such as'),
        (["--tasks.names=[]", "--tasks.limit=3"], "tasks.limit means nothing without tasks.names; name tasks there"),
    ],
)
def test_what_cannot_be_evaluated_is_refused_before_the_first_step(corpus, tmp_path, overrides, said):
    assert said in refused([*tiny_arguments(corpus, tmp_path / "run", **TASKS), *overrides])
    assert not (tmp_path / "run").exists()


def test_what_the_command_refuses_is_refused_before_the_first_step(corpus, tmp_path, stand_in, monkeypatch):
    stand_in.write_text(f"#!{sys.executable} -S\nraise SystemExit('error: there is no such task')\n")
    monkeypatch.setattr(sys, "executable", str(stand_in))
    assert refused(tiny_arguments(corpus, tmp_path / "run", **TASKS)) == "tasks.names: there is no such task"
    assert not (tmp_path / "run").exists()


TASK = """\
task: next_word
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: multiple_choice
doc_to_text: text
doc_to_target: answer
doc_to_choice: choices
metric_list: [{metric: acc}, {metric: acc_norm}]
"""


@pytest.fixture
def task(tmp_path, monkeypatch) -> Path:
    """The folder of a task whose data are in a file, since there is no network."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    folder = tmp_path / "task"
    folder.mkdir()
    rows = [{"text": f"def f{n}(", "choices": ["self", "import", "):"], "answer": n % 3} for n in range(6)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "next_word.yaml").write_text(TASK.replace("DATA", str(folder / "rows.jsonl")))
    return folder


def train_once(mesh: Mesh, command: list[str]) -> None:
    with undrawn():
        train(read_config(command), mesh.device)


@pytest.mark.slow
@pytest.mark.parametrize("grid", [{"pipeline": 2}, {"tensor": 2}, {}], ids=["pipeline", "tensor", "data, zero 3"])
def test_scores_are_those_of_the_command_on_the_checkpoint(corpus, tmp_path, task, grid):
    layout = {f"parallel__{axis}": size for axis, size in grid.items()} or {"parallel__zero_stage": 3}
    settings = {"training__steps": 1, "tasks__names": "[next_word]", "tasks__path": task, "tasks__limit": 4} | layout
    run_distributed(train_once, 2, tiny_arguments(corpus, tmp_path / "run", **settings), **grid, time_limit=300)
    with exported(tmp_path / "run") as export:
        expected = evaluate_tasks(export, TaskSet(["next_word"], task), limit=4).tasks
    (record,) = read_metrics(tmp_path / "run")
    assert {f"tasks/{score.task}/{score.metric}": score.value for score in expected} == {
        name: value for name, value in record.items() if name.startswith("tasks/")
    }


@pytest.mark.slow
def test_an_unknown_task_and_lost_data_are_refused_before_the_first_step(corpus, tmp_path, task):
    arguments = tiny_arguments(corpus, tmp_path / "run", tasks__names="[next_wrd]", tasks__path=task)
    assert "no task next_wrd; did you mean next_word" in refused(arguments)
    (task / "rows.jsonl").unlink()
    arguments = tiny_arguments(corpus, tmp_path / "run", tasks__names="[next_word]", tasks__path=task)
    assert "tasks.names: the data of next_word cannot be loaded" in refused(arguments)
    assert not (tmp_path / "run").exists()
