"""Validation sets by name, before the first step and after others: the same samples each time, whatever the grid."""

import json
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_ponder.base.errors import Preempted, UserError
from megatron_ponder.base.signals import StopSignals
from megatron_ponder.base.watchdog import Watchdog
from megatron_ponder.checkpoint.load import load_model
from megatron_ponder.config import read_config
from megatron_ponder.data.dataset import Share
from megatron_ponder.data.dataset_writer import IndexedDatasetWriter
from megatron_ponder.data.mixture import validation_sets
from megatron_ponder.evaluation.perplexity import Setting, evaluate
from megatron_ponder.evaluation.sources import split_batches
from megatron_ponder.parallel.mesh import Mesh
from megatron_ponder.parallel.sharding import initialize
from megatron_ponder.runs.metrics import read_metrics
from megatron_ponder.runs.run_log import RUN_LOG
from megatron_ponder.training.boundary import Boundary
from megatron_ponder.training.deepspeed_engine import Engine
from megatron_ponder.training.objective import Objective
from megatron_ponder.training.trainer import train
from megatron_ponder.training.validation_sets import ValidationSets
from tests.distributed import run_distributed
from tests.finished_runs import refused, tiny_arguments, train_in_turn
from tests.training.test_validation import prepared

SAMPLES = 7  # which no grid divides evenly
GRIDS = {
    "data": ({}, 2),
    "pipeline": ({"pipeline": 2}, 2),
    "tensor": ({"tensor": 2}, 2),
    "sequence": ({"tensor": 2, "sequence_parallel": True}, 2),
    "data and pipeline": ({"pipeline": 2}, 4),
}


class Noted:
    """Samples that note which of them are read."""

    def __init__(self, samples) -> None:
        self._samples, self.positions = samples, []
        self.samples_per_epoch = samples.samples_per_epoch

    def read(self, position: int, share: Share) -> np.ndarray:
        self.positions.append(position)
        return self._samples.read(position, share)

    def describe(self, position: int) -> str:
        return self._samples.describe(position)


@pytest.fixture(scope="module")
def arguments(corpus, tmp_path_factory) -> list[str]:
    """A run with a valid part of its own, the same once more by name, and a set of a dataset that nobody trains on."""
    folder = tmp_path_factory.mktemp("sets")
    tokens = np.random.default_rng(0).integers(0, 512, 9 * 64)
    with IndexedDatasetWriter(folder / "noise", np.dtype("<u2")) as writer:
        writer.add_document(tokens)
    sets = {"noise": str(folder / "noise"), "twice": str(corpus.dataset)}
    overrides = {"data__sequence_length": 64, "data__split": "97,3,0", "data__validation": json.dumps(sets)}
    return tiny_arguments(corpus, folder / "run", **overrides)


def validated(mesh: Mesh, arguments: list[str]) -> tuple[dict, list[str], dict[str, list[int]], int]:
    """Fields and words of a validation, which samples of every set this rank has read, and its data rank."""
    zero = 3 if mesh.pipeline.size == 1 and mesh.tensor.size == 1 else 1
    grid = [
        f"--parallel.tensor={mesh.tensor.size}",
        f"--parallel.sequence_parallel={mesh.tensor.sequence_parallel}".lower(),
    ]
    config, parts, model = prepared([*arguments, *grid], SAMPLES, mesh.data.size + 1, zero, mesh)
    initialize(model, seed=3)  # which, unlike what is done in `prepared`, knows the shares of tensor ranks
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith("router"):
                parameter.add_(torch.randn(parameter.shape, generator=generator))
    sets = {name: Noted(samples) for name, samples in validation_sets(parts.datasets, config.data).items()}
    engine = Engine(Objective(model), config, mesh)
    found = ValidationSets(config, mesh, sets, engine, Boundary(StopSignals(), None, mesh), Watchdog(0)).run(3)
    return found.fields, found.said, {name: samples.positions for name, samples in sets.items()}, mesh.data.rank


@pytest.fixture(scope="module")
def alone(arguments) -> tuple:
    (found,) = run_distributed(validated, 1, arguments)
    return found


def test_every_set_has_its_own_numbers(alone):
    fields, said, read, _ = alone
    plain = [name for name in fields if "/" not in name]
    assert "validation_pruned_loss" in plain
    assert list(fields) == plain + [f"{name}/{of}" for of in ("noise", "twice") for name in plain]
    assert read == dict.fromkeys(("valid", "noise", "twice"), [*range(SAMPLES)] * 2)  # soft, then pruned
    assert all(fields[name] == fields[f"{name}/twice"] for name in plain)
    assert fields["validation_loss/noise"] != fields["validation_loss"]
    loss, noise = fields["validation_loss"], fields["validation_loss/noise"]
    steps = fields["validation_mean_latent_steps"]
    expected = f"validation loss {loss:.4f} (noise {noise:.4f}, twice {loss:.4f})  latent steps/token {steps:.2f}"
    assert said == [f"step 3  {expected}"]


@pytest.mark.parametrize(
    "name", [name if name in ("data", "pipeline") else pytest.param(name, marks=pytest.mark.slow) for name in GRIDS]
)
def test_the_same_samples_whatever_the_grid(alone, arguments, name):
    axes, ranks = GRIDS[name]
    found = run_distributed(validated, ranks, arguments, **axes, time_limit=300)
    for fields, said, *_ in found:
        assert fields.keys() == alone[0].keys()
        for field, value in fields.items():
            assert value == pytest.approx(alone[0][field], rel=2e-5, abs=1e-6), field
        assert said == alone[1]
    by_data_rank = {data_rank: read for *_, read, data_rank in found}
    for of in ("valid", "noise", "twice"):
        together = [position for read in by_data_rank.values() for position in read[of]]
        assert sorted(together) == sorted([*range(SAMPLES)] * 2)


def test_without_a_valid_part_the_loss_is_that_of_all_sets_together(corpus, arguments, alone):
    """Equal sets weigh the same."""
    none = f"--data.valid_path=[{{path: {corpus.dataset}, split: [1]}}]"
    (found,) = run_distributed(validated, 1, [*arguments, none])
    fields, _, read, _ = found
    assert read.keys() == {"noise", "twice"}
    mean = (alone[0]["validation_loss/noise"] + alone[0]["validation_loss/twice"]) / 2
    assert fields["validation_loss"] == pytest.approx(mean)
    assert fields["validation_loss/noise"] == alone[0]["validation_loss/noise"]
    counts = (alone[0][f"validation_latent_step_histogram/{name}"] for name in ("noise", "twice"))
    assert fields["validation_latent_step_histogram"] == [a + b for a, b in zip(*counts, strict=True)]


class Stopped:
    """A signal that has arrived."""

    created, received = time.monotonic(), "SIGUSR1"


def train_all(mesh: Mesh, commands: list[list[str]], cut_off: list[str]) -> str:
    """Train by all of the commands, and say how the one ends that is told to before its first step."""
    train_in_turn(mesh, commands)
    with pytest.raises(Preempted) as stop:
        train(read_config(cut_off), mesh.device, Stopped())
    return str(stop.value)


@pytest.fixture(scope="module")
def runs(arguments, tmp_path_factory) -> Path:
    """Runs of 4 steps: from the beginning, resumed, and from the weights of the first, one of them told not to ask."""
    folder = tmp_path_factory.mktemp("runs")

    def run(name: str, **overrides) -> list[str]:
        given = {"training.run_dir": folder / name, "training.steps": 4, "training.eval_interval": 2}
        given |= {"checkpoint.interval": 2} | overrides
        return [*arguments, *(f"--{key}={value}" for key, value in given.items())]

    whole = folder / "whole" / "checkpoints"
    weights = {"checkpoint.initialize_from": whole / "step-00000004", "training.steps": 1, "training.eval_interval": 9}
    commands = [
        run("whole", **{"training.eval_at_start": "true"}),
        run("resumed", **{"checkpoint.resume": whole / "step-00000002", "training.eval_at_start": "true"}),
        run("anew", **weights),
        run("unasked", **weights | {"training.eval_at_start": "false"}),
    ]
    cut_off = run("cut off", **{"training.eval_at_start": "true"})
    (said,) = run_distributed(train_all, 1, commands, cut_off, time_limit=300)
    (folder / "said").write_text(said)
    return folder


def validations(run: Path) -> dict[int, dict]:
    """What was validated after which step."""
    return {
        record["step"]: {name: value for name, value in record.items() if name.startswith("validation_")}
        for record in read_metrics(run)
        if "validation_loss" in record
    }


def without_exact(numbers: dict) -> dict:
    """Those that every validation has."""
    return {name: value for name, value in numbers.items() if "exact" not in name}


def test_the_same_after_a_resume_which_repeats_nothing(runs):
    whole, resumed = validations(runs / "whole"), validations(runs / "resumed")
    assert list(whole) == [0, 2, 4]
    assert {"validation_loss", "validation_loss/noise", "validation_own_losses/twice"} <= whole[0].keys()
    assert resumed == {4: whole[4]}
    exact = ("loss", "gap", "mean_latent_steps")
    of_exact = [f"validation_exact_{name}{of}" for of in ("", "/noise", "/twice") for name in exact]
    assert [name for name in whole[4] if "exact" in name] == of_exact
    assert not any("exact" in name for step in (0, 2) for name in whole[step])
    log = (runs / "whole" / RUN_LOG).read_text()
    loss, gap = whole[4]["validation_exact_loss"], whole[4]["validation_exact_gap"]
    assert f"step 4  validation by exact {loss:.4f}, with R of training {loss - gap:.4f}\n" in log
    assert "validation on 6 samples of valid, 6 samples of noise, 6 samples of twice" in log


def test_weights_that_are_given_are_validated_before_the_first_step(runs):
    """They are those of the end of the other run, and so is what they are worth."""
    last = validations(runs / "whole")[4]
    assert validations(runs / "anew") == {0: without_exact(last), 1: validations(runs / "anew")[1]}
    first, step = read_metrics(runs / "anew")
    assert first.keys() == {"step", *validations(runs / "anew")[0]}
    assert step["step"] == 1
    assert list(validations(runs / "unasked")) == [1]


def test_a_validation_before_the_first_step_that_is_cut_off_leaves_nothing(runs):
    assert (runs / "said").read_text().startswith("stopped at step 0 by SIGUSR1; there is nothing to save yet; resume")
    assert read_metrics(runs / "cut off") == []
    assert not (runs / "cut off" / "checkpoints").exists()


def test_a_set_is_evaluated_by_its_name(runs):
    loaded = load_model(runs / "whole")
    batches, name = split_batches(loaded, None, "noise", loaded.config.training.eval_samples)
    assert name == "the validation set noise"
    setting = Setting(loaded.model.rule("soft"), loaded.config.ponder_training.evaluation_refinements)
    expected = validations(runs / "whole")[4]["validation_loss/noise"]
    assert evaluate(loaded.model, batches, setting).cross_entropy == pytest.approx(expected, rel=1e-5)
    with pytest.raises(UserError, match="there is no split nose; choose one of train, valid, test, noise, twice"):
        split_batches(loaded, None, "nose", 1)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (
            {"data.split": "1", "training.eval_at_start": "true", "data.validation": "{}"},
            "training.eval_at_start is true, but there is nothing to validate on; give data.split a second weight, or",
        ),
        ({"data.validation": "{code: no/such}"}, "data.validation.code: no/such.bin does not exist"),
        ({"data.validation": "{large: LARGE}"}, "large has token ids up to 600; set model.vocab_size to at least 601"),
        ({"data.validation": "{foreign: FOREIGN}"}, "foreign was made with another tokenizer than"),
    ],
)
def test_what_cannot_be_validated_is_refused_before_anything_is_written(arguments, tmp_path, overrides, said):
    for name, largest in (("large", 600), ("foreign", 7)):
        with IndexedDatasetWriter(tmp_path / name, np.dtype("<u2")) as writer:
            writer.add_document(np.arange(100) * 0 + largest)
    manifest = {"tokenizer": "0" * 64, "vocab_size": 512, "eod_id": 0, "documents": 1, "tokens": 100, "text_bytes": 1}
    (tmp_path / "foreign.json").write_text(json.dumps(manifest))
    given = {name: value.replace("LARGE", f"{tmp_path}/large") for name, value in overrides.items()}
    given = {name: value.replace("FOREIGN", f"{tmp_path}/foreign") for name, value in given.items()}
    run = tmp_path / "run"
    message = refused(
        [*arguments, f"--training.run_dir={run}", *(f"--{name}={value}" for name, value in given.items())]
    )
    assert said in message
    assert not run.exists()
