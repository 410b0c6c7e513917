"""Steps that are traced: a file that a browser opens, with the parts of a step; and no cost in all others."""

import gzip
import json
from pathlib import Path

import pytest
import torch

from megatron_ponder.base.errors import UserError
from megatron_ponder.config import read_config
from megatron_ponder.config.run import TrainingConfig
from megatron_ponder.model.spans import span
from megatron_ponder.runs.run_output import Silence
from megatron_ponder.training.profiler import FOLDER, Profiler
from tests.distributed import run_distributed
from tests.finished_runs import tiny_arguments, train_in_turn

CPU = torch.device("cpu")


def profiler(folder: Path, first: int, last: int, rank: int = 0, ranks: int = 1, **chosen: list[int]) -> Profiler:
    training = TrainingConfig(run_dir=str(folder), steps=9, profile_steps=[first, last], **chosen)
    return Profiler(training, rank, ranks, CPU, Silence())


def names(path: Path) -> set[str]:
    """Of all events of a trace."""
    return {event["name"] for event in json.loads(gzip.open(path).read())["traceEvents"]}


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / FOLDER).glob("*"))


def run_steps(traced: Profiler, steps: range) -> None:
    with traced:
        for step in steps:
            traced.begin(step)
            with span(f"step {step}"):
                torch.ones(3).sum()
            traced.end(step)


def test_a_run_writes_a_trace_of_its_parts(corpus, tmp_path):
    keys = {"ponder__mode": "adaptive", "training__steps": 3, "training__profile_steps": "[2,2]"}
    arguments = tiny_arguments(corpus, tmp_path, **keys, checkpoint__interval=2)
    run_distributed(train_in_turn, 1, [arguments])
    assert files(tmp_path) == ["rank_0_steps_2_to_2.json.gz"]
    found = names(tmp_path / FOLDER / "rank_0_steps_2_to_2.json.gz")
    assert {"data", "router", "loss", "backward", "optimizer", "checkpoint", "pass 0: 1 slots a token"} <= found


def test_the_steps_are_first_to_last(tmp_path):
    run_steps(profiler(tmp_path, 2, 3), range(1, 6))
    assert files(tmp_path) == ["rank_0_steps_2_to_3.json.gz"]
    found = names(tmp_path / FOLDER / "rank_0_steps_2_to_3.json.gz")
    assert {name for name in found if name.startswith("step")} == {"step 2", "step 3"}


@pytest.mark.parametrize(
    ("steps", "written"),
    [
        (range(1, 3), ["rank_0_steps_2_to_2.json.gz"]),  # preempted between them
        (range(3, 9), ["rank_0_steps_3_to_4.json.gz"]),  # resumed between them
        (range(5, 9), []),  # resumed after them
        (range(1, 2), []),  # stopped before them
    ],
)
def test_a_run_that_takes_some_of_the_steps_traces_those(tmp_path, steps, written):
    run_steps(profiler(tmp_path, 2, 4), steps)
    assert files(tmp_path) == written


def test_other_ranks_trace_nothing(tmp_path):
    run_steps(profiler(tmp_path, 1, 1, rank=0, ranks=2, profile_ranks=[1]), range(1, 3))
    run_steps(profiler(tmp_path, 1, 1, rank=1, ranks=2, profile_ranks=[1]), range(1, 3))
    assert files(tmp_path) == ["rank_1_steps_1_to_1.json.gz"]
    with pytest.raises(UserError, match="has rank 2, but there are 2"):
        profiler(tmp_path, 1, 1, ranks=2, profile_ranks=[0, 2])


def test_nothing_is_paid_outside_of_these_steps(tmp_path):
    assert span("a") is span("b")
    traced = profiler(tmp_path, 2, 2)
    traced.begin(1)
    assert not torch.autograd._profiler_enabled()


def test_a_folder_that_cannot_be_written_costs_the_trace_alone(tmp_path):
    (tmp_path / FOLDER).write_text("a file")
    run_steps(profiler(tmp_path, 1, 1), range(1, 3))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--training.profile_steps=[3,2]"], r"profile_steps \[3, 2\] must be the first and the last step"),
        (["--training.profile_steps=[5]"], r"profile_steps \[5\] must be"),
        (["--training.profile_steps=[5,11]", "--training.steps=10"], "of the training.steps 10"),
        (["--training.profile_steps=[0,1]"], "its range is 1 to"),
        (["--training.profile_ranks=[0]"], "trace nothing without"),
        (["--training.profile_steps=[1,1]", "--training.profile_ranks=[]"], "is empty"),
    ],
)
def test_what_cannot_be_traced_is_refused(words, message):
    with pytest.raises(UserError, match=message):
        read_config(words)
