"""A step that takes long is given up in its middle, by all ranks alike, and leaves no trace."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron_ponder.checkpoint.folders import latest_checkpoint
from megatron_ponder.parallel.mesh import Mesh
from megatron_ponder.runs.metrics import read_metrics
from megatron_ponder.training import interruption
from megatron_ponder.training.interruption import Abandoned, Interruption
from tests.distributed import run_distributed
from tests.finished_runs import alone, tiny_arguments
from tests.training.test_faults import Attempt, attempt
from tests.training.test_preemption import AfterLooks
from tests.training.test_resume import essentials, final_state

# Looks for a signal after which it comes: a step has one before each pass, forward and backward, and one at its end.
LOOKS = (3, 8, 19)
PIPELINE = {"parallel__pipeline": 2, "training__micro_batch_size": 1}
LAYOUTS = {"data": {}, "tensor": {"parallel__tensor": 2}, "pipeline": PIPELINE}
ON_ONE = {"one": {}, "own latents": {"ponder__mode": "adaptive", "ponder__latent_visibility": "own"}}
MORE = {
    "zero 3": {"parallel__zero_stage": 3},
    "zero 2": {"parallel__zero_stage": 2, "training__precision": "bf16"},
    "zero 0, several micro-batches": {"parallel__zero_stage": 0, "training__micro_batch_size": 1},
    "zero bubble": PIPELINE | {"parallel__pipeline_schedule": "zero_bubble"},
}
SETTINGS = {"training__steps": 5, "training__eval_interval": 0, "checkpoint__resume": "auto"}


def interrupted(mesh: Mesh, commands: dict[str, list[list[str]]]) -> dict[str, list[Attempt]]:
    """Of each layout an uninterrupted run, then one that is interrupted again and again, and at last finished."""
    interruption.SECONDS_OF_A_LONG_STEP = -1.0
    seen = {}
    for name, (whole, broken) in commands.items():
        seen[name] = [attempt(mesh, whole)]
        last = not dist.is_initialized() or dist.get_rank() == dist.get_world_size() - 1
        for looks in (*LOOKS, 10**9):
            seen[name].append(attempt(mesh, broken, AfterLooks(looks if last else 10**9)))
    return seen


def commands_in(corpus, folder: Path, layouts: dict[str, dict]) -> dict[str, list[list[str]]]:
    return {
        name: [tiny_arguments(corpus, folder / name / run, **SETTINGS, **layout) for run in ("whole", "broken")]
        for name, layout in layouts.items()
    }


def check(folder: Path, attempts: list[Attempt]) -> None:
    whole, *broken, last = attempts
    assert whole.end == last.end == "finished"
    assert all(stopped.end.startswith("Preempted: stopped at step ") for stopped in broken)
    given_up = [stopped for stopped in broken if "is given up; it has changed nothing" in stopped.printed]
    assert len(given_up) >= 2
    assert essentials(folder / "broken") == essentials(folder / "whole")
    want, got = final_state(folder / "whole"), final_state(folder / "broken")
    assert want.keys() == got.keys()
    assert all(torch.equal(got[key], tensor) for key, tensor in want.items())


def check_on_two_ranks(corpus, folder: Path, layouts: dict[str, dict]) -> None:
    first, second = run_distributed(interrupted, 2, commands_in(corpus, folder, layouts), time_limit=500)
    for name in layouts:
        assert [seen.end for seen in first[name]] == [seen.end for seen in second[name]], name
        check(folder / name, first[name])


def test_a_step_that_is_given_up_leaves_no_trace(corpus, tmp_path):
    check_on_two_ranks(corpus, tmp_path, LAYOUTS)


@pytest.mark.slow
def test_the_same_in_other_layouts(corpus, tmp_path):
    check_on_two_ranks(corpus, tmp_path, MORE)


def test_the_same_on_one_rank(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(interruption, "SECONDS_OF_A_LONG_STEP", -1.0)
    with alone() as device:
        seen = interrupted(Mesh(device=device), commands_in(corpus, tmp_path, ON_ONE))
    for name in ON_ONE:
        check(tmp_path / name, seen[name])


def test_a_first_step_that_is_given_up_leaves_nothing_to_save(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(interruption, "SECONDS_OF_A_LONG_STEP", -1.0)
    run = tmp_path / "run"
    with alone() as device:
        end = attempt(Mesh(device=device), tiny_arguments(corpus, run, **SETTINGS), AfterLooks(2)).end
    assert end == (
        "Preempted: stopped at step 0 by SIGUSR1; there is nothing to save yet; resume with --checkpoint.resume auto"
    )
    assert latest_checkpoint(run / "checkpoints") is None
    assert read_metrics(run) == []


def test_short_steps_are_finished():
    signals = AfterLooks(0)
    halt = Interruption(signals, Mesh())
    with halt.possible(expected=100.0):
        assert not halt.point()  # it may be over soon
        halt._begun -= 10
        with pytest.raises(Abandoned, match="SIGUSR1"):
            halt.point()
        halt._reason = None
    halt._begun -= 10
    assert not halt.point()  # outside of a step
    with halt.possible(expected=1.0):
        halt._begun -= 10
        assert not halt.point()
