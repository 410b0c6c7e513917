"""A run that is killed fifty times, whenever and whichever rank, is the run that was never interrupted."""

import json
from pathlib import Path

import pytest
import torch

from megatron_ponder.runs.metrics import read_metrics
from megatron_ponder.runs.starts import read_end, read_starts
from tests.finished_runs import tiny_arguments
from tests.training.kills import run_and_kill
from tests.training.test_resume import essentials, final_state

SEED, KILLS, STEPS, RANKS = 20, 50, 300, 2


def run(folder: Path, kills: int, arguments: list[str]) -> dict:
    folder.mkdir()
    seen = run_and_kill(SEED, kills, RANKS, folder, arguments)
    assert seen["codes"] == [0] * RANKS, sorted(folder.iterdir())[-1].read_text()
    return seen


@pytest.mark.slow
def test_fifty_random_kills_change_nothing(corpus, tmp_path):
    settings = {
        "training__steps": STEPS,
        "training__eval_interval": 10,
        "training__eval_samples": 60,
        "checkpoint__interval": 10,
        "checkpoint__resume": "auto",
        "data__num_workers": 1,
        "logging__interval": 1,
        "parallel__start_timeout": 10,
    }
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    run(tmp_path / "once", 0, tiny_arguments(corpus, whole, **settings))
    seen = run(tmp_path / "often", KILLS, tiny_arguments(corpus, broken, **settings))
    print(json.dumps(seen))

    assert len(seen["steps_at_kill"]) == KILLS
    assert len(set(seen["steps_at_kill"])) > KILLS // 5, "kills came at all sorts of steps"
    places = seen["places"]
    assert sum(places.values()) == KILLS
    assert places.get("start", 0) < KILLS / 3, "most kills hit the run itself"
    assert min(places.get(place, 0) for place in ("step", "save", "validation")) >= KILLS // 10
    assert seen["left"] == [], "a process was left"
    assert [record["samples"] for record in read_metrics(broken)] == [4 * step for step in range(1, STEPS + 1)]
    assert essentials(broken) == essentials(whole)
    want, got = final_state(whole), final_state(broken)
    assert want.keys() == got.keys()
    assert all(torch.equal(got[key], tensor) for key, tensor in want.items())
    left = [str(path) for path in broken.rglob("*") if "partial" in path.name or "lock" in path.name]
    assert left == []
    assert len(read_starts(broken)) <= KILLS + 1
    assert read_end(broken)["reason"] == "finished"
