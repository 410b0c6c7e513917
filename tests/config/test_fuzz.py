"""Nonsense and border values for every key: each is refused in one line, or it trains."""

import dataclasses
import random
import traceback
import typing
from pathlib import Path

import pytest
import torch

from megatron_ponder.base.errors import UserError
from megatron_ponder.base.launch import Launch
from megatron_ponder.config import Config, check_layout, read_config
from megatron_ponder.config.declarations import range_of
from megatron_ponder.model.ponder import PonderLM
from megatron_ponder.parallel.mesh import Mesh
from megatron_ponder.runs.metrics import of_steps, read_metrics
from megatron_ponder.training.trainer import train
from tests.distributed import run_distributed
from tests.finished_runs import tiny_arguments, undrawn

SEED = 20_260_131
FIELDS = {
    f"{section.name}.{item.name}": item
    for section in dataclasses.fields(Config)
    for item in dataclasses.fields(section.default_factory)
}
TYPES = {
    f"{section.name}.{name}": kind
    for section in dataclasses.fields(Config)
    for name, kind in typing.get_type_hints(section.default_factory).items()
}
NONSENSE = [
    "",
    " ",
    "-",
    "a",
    "null",
    "true",
    "[]",
    "{}",
    "[1]",
    "{a: 1}",
    "[",
    "*a",
    "!!int 3",
    "\x00",
    "é",
    "a" * 5000,
]
NUMBERS = ["-1", "0", "1", "2", "3", "010", "1e3", "1.5", "0x10", "9" * 400, "1_0", str(2**31), str(2**63), "1e30"]
NUMBERS += ["-0.0", "1e-320", "1e-45", "1e38", "1e308", "1e400", ".inf", "-.inf", ".nan", "inf", "nan", "[1, 2]"]
TEXTS = [
    "none",
    "auto",
    "~",
    "~nobody_of_this_name",
    "/dev/null",
    ".",
    "0,0,0",
    "1",
    "-1,2",
    "1:00:00",
    "[a, b]",
    "[1, a]",
]
# What would write elsewhere, wait, compile, or ask a server, and is read but not trained with.
NOT_TRAINED = {
    "training.run_dir",
    "training.step_timeout",
    "training.steps",
    "logging.wandb_project",
    "data.cache_path",
    "tasks.names",
}
NOT_TRAINED |= {"parallel.offload_optimizer", "parallel.offload_nvme_path", "data.num_workers"}
LARGEST = 100_000  # parameters, and numbers of a batch, that a test trains with


def values_of(key: str) -> list[str]:
    """Values for a key: those at the ends of what it may have, and some that it may not."""
    values, kind, limits = list(NONSENSE), TYPES[key], range_of(FIELDS[key])
    if limits is not None:
        ends = [limits.low, limits.high, limits.low - 1, limits.high + 1, limits.low * 1.5, limits.high / 2]
        values += NUMBERS + [f"{end:.17g}" if isinstance(end, float) else str(end) for end in ends]
        values += [f"{round(end)}" for end in ends]
    if typing.get_origin(kind) is typing.Literal:
        values += typing.get_args(kind) * 3
    return values + TEXTS if str in (kind, *typing.get_args(kind)) else values


def overrides(source: random.Random, keys: list[str]) -> dict[str, str]:
    """One key, or sometimes two, with values."""
    chosen = [keys[0], *source.sample(sorted(FIELDS), source.random() < 0.25)]
    return {key: source.choice(values_of(key)) for key in chosen}


def small(config: Config) -> bool:
    """Whether a test can train with a configuration that was accepted; builds the model, without its memory."""
    model, training = config.model, config.training
    batch = training.global_batch_size * config.data.sequence_length * (1 + config.ponder.steps)
    passes = max(config.ponder_training.refinement_choices) * model.num_layers
    if model.num_layers > 50 or batch > LARGEST or passes > 100:
        return False
    with torch.device("meta"):
        built = PonderLM(dataclasses.replace(model, vocab_size=model.vocab_size or 512), config.ponder)
    return sum(parameter.numel() for parameter in built.parameters()) < LARGEST


def outcome(arguments: list[str], device: torch.device) -> str:
    """How a run by a command line ended: `trained`, its refusal, or a traceback."""
    try:
        config = read_config(arguments)
        check_layout(config, Launch())
        train(config, device)
        records = of_steps(read_metrics(Path(config.training.run_dir)))
        return "trained" if [record["step"] for record in records] == [1, 2] else f"Traceback: records {records}"
    except UserError as error:
        return f"refused: {error}"
    except Exception:
        return traceback.format_exc()


def train_each(mesh: Mesh, commands: list[list[str]]) -> list[str]:
    """How each of the runs ended; for `run_distributed`."""
    with undrawn():
        return [outcome(command, mesh.device) for command in commands]


@pytest.mark.parametrize(("tries", "runs"), [(300, 8), pytest.param(5000, 150, marks=pytest.mark.slow)])
def test_nonsense_is_refused_in_one_line_or_trains(corpus, tmp_path, tries, runs):
    source = random.Random(SEED + tries)
    print(f"seed {SEED + tries}")  # shown if this fails
    accepted, refusals, order = [], [], []
    for attempt in range(tries):
        order = order or source.sample(sorted(FIELDS), len(FIELDS))
        chosen = overrides(source, [order.pop()])
        base = tiny_arguments(corpus, tmp_path / f"{attempt}", training__steps=2, training__eval_interval=2)
        arguments = [*base, *(f"--{key}={value}" for key, value in chosen.items())]
        try:
            config = read_config(arguments)
        except UserError as error:
            refusals.append(str(error))
            continue
        except Exception as error:
            raise AssertionError(f"{chosen} ended in a traceback") from error
        if small(config) and not NOT_TRAINED & chosen.keys():
            accepted.append(arguments)
    assert [said for said in refusals if not said or "\n" in said or len(said) > 8000] == []
    assert len(accepted) > runs
    ends = run_distributed(train_each, 1, accepted[:runs], time_limit=60 + 10 * runs)[0]
    for arguments, end in zip(accepted, ends, strict=False):
        assert end == "trained" or (end.startswith("refused: ") and "\n" not in end), (arguments[-2:], end)
    assert ends.count("trained") > runs / 4
