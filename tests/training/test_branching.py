"""A run that branches off from another one goes on with all that the other had, by a schedule of its own."""

from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from megatron_ponder.base.errors import UserError
from megatron_ponder.checkpoint.folders import CONFIG, resolve_checkpoint
from megatron_ponder.checkpoint.load import load_weights
from megatron_ponder.checkpoint.optimizer_state import WEIGHT
from megatron_ponder.checkpoint.reader import open_tensors
from megatron_ponder.config import Config, load_config
from megatron_ponder.model.build import build_part
from megatron_ponder.model.tally import Tally
from megatron_ponder.parallel.mesh import Mesh
from megatron_ponder.runs.metrics import read_metrics
from megatron_ponder.training.changes import batches_changed, schedule_changed
from megatron_ponder.training.objective import Objective
from megatron_ponder.training.resuming import find_resume
from megatron_ponder.training.schedules import training_rule
from megatron_ponder.training.setup import open_parts
from tests.distributed import run_distributed
from tests.finished_runs import alone, refused, tiny_arguments, train_in_turn
from tests.models import small_config
from tests.training.test_resume import essentials, final_state

BARE = {
    "training__eval_interval": 0,
    "logging__own_losses_interval": 0,
    "optimizer__warmup_steps": 2,
    "model__init_std": 0.3,  # positions matter
}
RUN = BARE | {"ponder__mode": "vanilla"}
DECAY = {"optimizer__schedule": "wsd", "optimizer__decay_steps": 3, "optimizer__decay_shape": "1-sqrt"}


LONGER = {
    "data__sequence_length": 32,
    "training__steps": 6,
    "model__rope_scaling": "yarn",
    "model__rope_factor": 2,
    "model__rope_original_length": 16,
    "checkpoint__allow_rope_change": "true",
    "checkpoint__allow_data_change": "true",
    "logging__own_losses_interval": 0,
}


class Branches(NamedTuple):
    """Run folders: one that was never branched, one that stopped at its stable rate, and two that go on from that."""

    whole: Path
    stable: Path
    decayed: Path
    longer: Path


@pytest.fixture(scope="module")
def branches(corpus, tmp_path_factory) -> Branches:
    folder = tmp_path_factory.mktemp("branches")
    found = Branches(*(folder / name for name in Branches._fields))
    stable = {"optimizer__schedule": "wsd", "optimizer__decay_steps": 0, "training__steps": 5}
    off = {"checkpoint__branch_from": found.stable, "checkpoint__resume": "auto"}
    commands = [
        tiny_arguments(corpus, found.whole, **RUN, **DECAY),
        tiny_arguments(corpus, found.stable, **RUN, **stable),
        tiny_arguments(corpus, found.decayed, **RUN, **DECAY, **off),
        tiny_arguments(corpus, found.longer, **RUN | stable | LONGER, **off),
    ]
    run_distributed(train_in_turn, 1, commands, time_limit=300)
    return found


def test_a_decay_that_branches_off_is_that_of_a_run_that_never_did(branches):
    """Bit for bit: up to the branch, and with the same decay from there on, in losses, weights and moments."""
    whole = of_run(branches.whole)
    assert len({record["learning_rate"] for record in whole}) == 4  # half of the peak, it, and twice below it
    assert of_run(branches.stable) + of_run(branches.decayed) == whole
    want, got = final_state(branches.whole), final_state(branches.decayed)
    assert want.keys() == got.keys()
    assert all(torch.equal(got[key], tensor) for key, tensor in want.items())
    log = (branches.decayed / "train.log").read_text(encoding="utf-8")
    assert f"going on after step 5 of {branches.stable / 'checkpoints' / 'step-00000005'}: " in log
    was, now = "constant at 0.01", "wsd at 0.01, 1-sqrt from step 5 to 0.001 at step 8"
    assert f"the schedule of the learning rate was {was}; from step 5 on it is {now}" in log


def of_run(run_dir: Path) -> list[dict]:
    """Records without what depends on how long the run was to be."""
    return [{key: value for key, value in record.items() if key != "steps_left"} for record in essentials(run_dir)]


def test_a_run_goes_on_with_longer_sequences_and_slower_positions(branches):
    """The first step with them has the loss of the checkpoint's weights in the model that is configured now."""
    config, parts = open_parts(load_config(branches.longer / CONFIG))
    stored = load_config(branches.stable / CONFIG)
    (record,) = read_metrics(branches.longer)
    assert (record["step"], record["samples"], record["tokens"]) == (6, 24, 20 * 16 + 4 * 32)
    tokens = torch.stack([torch.from_numpy(parts.datasets["train"][position]) for position in range(20, 24)])
    assert tokens.shape == (4, 33)
    checkpoint, losses = resolve_checkpoint(branches.stable), []
    for model_config in (config.model, stored.model):
        objective = Objective(build_part(replace(config, model=model_config), Mesh(), None))
        with open_tensors(checkpoint) as tensors:
            load_weights(objective.model, tensors.of_kind(WEIGHT))
        sums = objective(tokens, record["refinements"], training_rule(5, config))[1].sum(0)
        losses.append(Tally.of(sums).mean_loss)
    assert record["cross_entropy"] == pytest.approx(losses[0], rel=1e-6)
    assert abs(losses[1] - losses[0]) > 1e-3  # by what the positions are turned
    log = (branches.longer / "train.log").read_text(encoding="utf-8")
    assert "model.rope_scaling was none and is yarn, model.rope_factor was None and is 2.0, " in log
    assert "data.sequence_length was 16 and is 32" in log
    assert f"the data are not those that {checkpoint} was trained on; their sample 20 comes next" in log


def test_other_positions_have_to_be_allowed(corpus, branches, tmp_path):
    off = {"checkpoint__branch_from": branches.stable, "checkpoint__allow_rope_change": "false"}
    said = refused(tiny_arguments(corpus, tmp_path / "run", **RUN | LONGER | off))
    assert said.startswith("model.rope_scaling is yarn, but ")
    assert said.endswith(
        "was trained with none; set --model.rope_scaling none, or add --checkpoint.allow_rope_change "
        "true to train it for other positions"
    )


@pytest.mark.slow
def test_longer_sequences_are_the_same_on_every_grid(corpus, branches, tmp_path):
    grids = {
        "tensor and pipeline": {"parallel__tensor": 2, "parallel__pipeline": 2},
        "data at ZeRO 3": {"parallel__zero_stage": 3, "training__micro_batch_size": 1},
    }
    for name, grid in grids.items():
        given = RUN | {"optimizer__schedule": "constant", "checkpoint__branch_from": branches.stable} | LONGER | grid
        run_distributed(train_in_turn, 4, [tiny_arguments(corpus, tmp_path / name, **given)], time_limit=300)
        for record, expected in zip(read_metrics(tmp_path / name), read_metrics(branches.longer), strict=True):
            for field in ("cross_entropy", "grad_norm"):
                assert record[field] == pytest.approx(expected[field], rel=1e-5), (name, field)


def test_a_folder_that_has_checkpoints_goes_on_from_them(branches, tmp_path):
    def start(run: Path) -> Path:
        names = {"training__run_dir": run, "checkpoint__resume": "auto", "checkpoint__branch_from": branches.stable}
        return find_resume(small_config(**names))[0]

    with alone():
        assert start(tmp_path) == resolve_checkpoint(branches.stable)
        assert start(branches.decayed) == branches.decayed / "checkpoints" / "step-00000008"


def changed(stored: Config, step: int, **now) -> list[str]:
    return schedule_changed(Path("checkpoint"), step, stored, small_config(**BARE, **now))


def test_other_batches_are_said():
    full = {"training__global_batch_size": 8, "training__micro_batch_size": 1}
    ramped = small_config(**full, training__batch_size_ramp="2 2 90")
    assert batches_changed(40, ramped, ramped) == []
    (line,) = batches_changed(40, ramped, small_config(**full))
    was = "2 sequences and 2 more at a time up to 8 at sample 90"
    assert line == f"the global batch was {was}; from sample 40 on it is 8 sequences"
    assert batches_changed(90, ramped, small_config(**full)) == []


def test_another_schedule_is_said_and_one_that_lies_in_the_past_is_refused():
    decays = {"optimizer__schedule": "wsd", "optimizer__decay_steps": 10}
    stored = small_config(**BARE, training__steps=100, **decays)
    assert changed(stored, 95, training__steps=100, **decays) == []
    (line,) = changed(stored, 50, training__steps=60, **decays)
    assert "linear from step 90 to 3e-05 at step 100; from step 50 on it is" in line
    (line,) = changed(stored, 50, training__steps=100)
    assert line.endswith("on it is cosine from 0.0003 after 2 steps of warm-up to 3e-05 at step 100")
    changes = changed(stored, 95, training__steps=100, **decays, optimizer__router_learning_rate_factor=0.1)
    assert changes == ["the factor on the router's learning rate was 1, and is 0.1"]
    with pytest.raises(UserError, match=r"begin at step 45, but .* has done 50 steps .*at most 5, or .* at least 60"):
        changed(stored, 50, training__steps=55, **decays)
