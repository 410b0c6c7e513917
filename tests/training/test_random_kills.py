"""A run that is killed fifty times, whenever and whichever rank, is the run that was never interrupted."""

import json
from pathlib import Path

import pytest

from megatron_ponder.checkpoint.folders import checkpoint_name, checkpoints_in
from megatron_ponder.runs.metrics import read_metrics
from megatron_ponder.runs.starts import read_end, read_starts
from tests.finished_runs import contents, tiny_arguments
from tests.training.kills import run_and_kill
from tests.training.test_resume import assert_same_run

SEED, KILLS, STEPS, RANKS = 20, 50, 300, 2
SETTINGS = {
    "training__eval_interval": 10,
    "training__eval_samples": 60,
    "checkpoint__interval": 10,
    "checkpoint__resume": "auto",
    "data__num_workers": 1,
    "logging__interval": 1,
    "parallel__start_timeout": 10,
}


def run(folder: Path, kills: int, arguments: list[str], seed: int = SEED) -> dict:
    folder.mkdir()
    seen = run_and_kill(seed, kills, RANKS, folder, arguments)
    assert seen["codes"] == [0] * RANKS, sorted(folder.iterdir())[-1].read_text()
    return seen


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
def test_kills_lose_no_export_and_no_checkpoint_that_is_to_be_kept(corpus, tmp_path, seed):
    settings = SETTINGS | {
        "training__steps": 60,
        "checkpoint__export_hf": "float32",
        "checkpoint__keep_every": 20,
        "ponder__latent_scale": "learned",
        "model__tie_embeddings": "true",
    }
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    run(tmp_path / "once", 0, tiny_arguments(corpus, whole, **settings))
    seen = run(tmp_path / "often", 8, tiny_arguments(corpus, broken, **settings), seed)
    print(json.dumps(seen))

    assert seen["left"] == [], "a process was left"
    assert_same_run(broken, whole)
    kept = [checkpoint_name(step) for step in (20, 40, 50, 60)]
    for folder in (whole, broken):
        assert [path.name for path in checkpoints_in(folder / "checkpoints")] == kept
    for name in kept:
        once, often = (contents(folder / "checkpoints" / name / "hf") for folder in (whole, broken))
        assert "model.safetensors" in once
        assert once == often, name
    assert [path for path in broken.rglob("*") if "partial" in path.name or "lock" in path.name] == []


@pytest.mark.slow
def test_fifty_random_kills_change_nothing(corpus, tmp_path):
    settings = SETTINGS | {"training__steps": STEPS}
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
    assert_same_run(broken, whole)
    left = [str(path) for path in broken.rglob("*") if "partial" in path.name or "lock" in path.name]
    assert left == []
    assert len(read_starts(broken)) <= KILLS + 1
    assert read_end(broken)["reason"] == "finished"
