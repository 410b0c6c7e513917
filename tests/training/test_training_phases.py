"""A run whose later steps are of other sequences, data and positions, in one start or in several."""

from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from megatron_ponder.checkpoint.folders import resolve_checkpoint
from megatron_ponder.checkpoint.reader import read_config_of
from megatron_ponder.data.preprocessing import preprocess
from megatron_ponder.runs.metrics import read_metrics
from megatron_ponder.runs.starts import read_starts
from tests.distributed import run_distributed
from tests.finished_runs import refused, tiny_arguments, train_in_turn
from tests.training.test_resume import essentials, final_state

RUN = {
    "training__eval_interval": 3,
    "checkpoint__interval": 3,
    "checkpoint__keep": 8,
    "logging__own_losses_interval": 0,
    "optimizer__warmup_steps": 2,
    "optimizer__schedule": "constant",
    "model__init_std": 0.3,  # positions matter
    "model__max_position_embeddings": 16,
}
BEGIN, STEPS = 5, 8
POSITIONS = {"rope_scaling": "yarn", "rope_factor": 2, "rope_original_length": 16}


class Runs(NamedTuple):
    """Run folders: two runs of which the second branches off, one with a phase, and one that was stopped twice."""

    before: Path
    branched: Path
    phased: Path
    resumed: Path


def phases(other: Path, *more: str) -> str:
    first = f"first_step: {BEGIN}, sequence_length: 32, global_batch_size: 2, path: {other}"
    return f"[{{{first}, {', '.join(f'{key}: {value}' for key, value in POSITIONS.items())}}}{''.join(more)}]"


@pytest.fixture(scope="module")
def other(corpus, tmp_path_factory) -> Path:
    files = sorted(corpus.text.parent.glob("*.py"))[:30]
    return preprocess(files, tmp_path_factory.mktemp("other") / "other", corpus.tokenizer).prefix


@pytest.fixture(scope="module")
def runs(corpus, other, tmp_path_factory) -> Runs:
    folder = tmp_path_factory.mktemp("phases")
    found = Runs(*(folder / name for name in Runs._fields))
    branch = {f"model__{key}": value for key, value in POSITIONS.items()} | {
        "data__sequence_length": 32,
        "data__path": other,
        "model__max_position_embeddings": 32,
        "training__global_batch_size": 2,
        "checkpoint__branch_from": found.before,
        "checkpoint__resume": "auto",
        "checkpoint__allow_rope_change": "true",
        "checkpoint__allow_data_change": "true",
    }
    phased = {"training__phases": phases(other)}
    resumed = {"checkpoint__resume": "auto"}
    commands = [
        tiny_arguments(corpus, found.before, **RUN, training__steps=BEGIN),
        tiny_arguments(corpus, found.branched, **RUN | branch),
        tiny_arguments(corpus, found.phased, **RUN, **phased),
        tiny_arguments(corpus, found.resumed, **RUN, **resumed, training__steps=BEGIN),
        tiny_arguments(corpus, found.resumed, **RUN, **resumed, **phased, training__steps=7),
        tiny_arguments(corpus, found.resumed, **RUN, **resumed, **phased),
    ]
    run_distributed(train_in_turn, 1, commands, time_limit=300)
    return found


def test_a_phase_is_a_run_that_branches_off(runs):
    """Bit for bit: in losses, validations, weights and moments."""
    apart = essentials(runs.before) + essentials(runs.branched)
    together = essentials(runs.phased)
    assert [record["tokens"] for record in together] == [64, 128, 192, 256, 320, 384, 448, 512]
    assert [record["samples"] for record in together] == [4, 8, 12, 16, 20, 22, 24, 26]
    for record, expected in zip(together, apart, strict=True):
        assert trained(record) == trained(expected)
    assert_same_end(runs.phased, runs.branched)
    assert len(read_starts(runs.phased)) == 1


def test_a_run_goes_on_at_the_beginning_of_a_phase_and_inside(runs):
    for record, expected in zip(essentials(runs.resumed), essentials(runs.phased), strict=True):
        validated = record["step"] == 7  # where a start of it ended
        kept = {key: value for key, value in record.items() if not (validated and key.startswith("validation"))}
        assert trained(kept) == trained(expected)
    assert_same_end(runs.resumed, runs.phased)


def trained(record: dict) -> dict:
    """What does not depend on how long a run is to be, or where it ended."""
    left_out = ("steps_left", "exact")
    return {key: value for key, value in record.items() if not any(word in key for word in left_out)}


def assert_same_end(one: Path, other: Path) -> None:
    got, want = final_state(one), final_state(other)
    assert got.keys() == want.keys()
    assert all(torch.equal(got[key], tensor) for key, tensor in want.items())


def test_what_is_otherwise_is_said_and_kept(runs, other):
    log = (runs.phased / "train.log").read_text(encoding="utf-8")
    assert f"going on after step {BEGIN}: " in log
    assert "model.rope_scaling was none and is yarn, model.rope_factor was None and is 2.0, " in log
    assert "data.sequence_length was 16 and is 32" in log
    assert "the global batch was 4 sequences; from sample 20 on it is 2 sequences" in log
    config = read_config_of(resolve_checkpoint(runs.phased))
    assert (config.data.sequence_length, config.model.max_position_embeddings) == (32, 32)
    assert (config.data.path, config.training.phases) == (str(other), [])


def test_data_of_a_later_phase_are_missed_before_the_first(corpus, tmp_path):
    said = refused(tiny_arguments(corpus, tmp_path / "run", **RUN, training__phases=phases(tmp_path / "none")))
    assert str(tmp_path / "none") in said
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "grid",
    [
        {"parallel__tensor": 2, "parallel__pipeline": 2},
        {"parallel__zero_stage": 3, "training__micro_batch_size": 1},
        {"parallel__context": 2, "training__micro_batch_size": 1},
    ],
    ids=lambda grid: " ".join(grid),
)
def test_phases_are_the_same_on_every_grid(corpus, other, runs, tmp_path, grid):
    ranks = 4 if "parallel__tensor" in grid else 2
    words = tiny_arguments(corpus, tmp_path / "run", **RUN | {"training__phases": phases(other)} | grid)
    run_distributed(train_in_turn, ranks, [words], time_limit=300)
    for record, expected in zip(read_metrics(tmp_path / "run"), read_metrics(runs.phased), strict=True):
        for field in ("cross_entropy", "grad_norm"):  # after seven steps of AdamW, which multiply what is rounded
            assert record[field] == pytest.approx(expected[field], rel=2e-4), field
