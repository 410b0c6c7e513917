"""Validation counts every sample once, however the ranks divide them, and agrees with evaluation."""

import functools
import zlib

import pytest
import torch

from megatron_ponder.base.signals import StopSignals
from megatron_ponder.base.watchdog import Watchdog
from megatron_ponder.config import Config, read_config
from megatron_ponder.data.loader import validation_batches
from megatron_ponder.evaluation.perplexity import Evaluation, Setting, evaluate
from megatron_ponder.model.ponder import PonderLM
from megatron_ponder.model.tally import Tally
from megatron_ponder.parallel.mesh import Mesh
from megatron_ponder.training.boundary import Boundary
from megatron_ponder.training.deepspeed_engine import Engine
from megatron_ponder.training.initial_weights import build_model
from megatron_ponder.training.objective import Objective
from megatron_ponder.training.setup import RunParts, open_parts
from megatron_ponder.training.validation import Validation, measure_each_step
from tests.distributed import run_distributed
from tests.finished_runs import tiny_arguments
from tests.models import random_tokens

# Samples: even, uneven, fewer than a micro-batch, fewer than ranks, more than the split holds.
CASES = [(8, 2, 1), (7, 2, 1), (7, 3, 3), (2, 4, 3), (1, 2, 3), (10**9, 16, 1)]
# Of these, by which the fixed point is measured: where the model is whole, and where ranks share its weights.
EXACT = {1: 5, 2: 5}


def prepared(
    arguments: list[str], samples: int, micro: int, stage: int, mesh: Mesh | None = None
) -> tuple[Config, RunParts, PonderLM]:
    """A model, or a rank's part of it, whose router decides differently from token to token."""
    mesh = mesh or Mesh()
    pipeline = mesh.pipeline.size
    overrides = [
        f"--training.eval_samples={samples}",
        "--training.exact_samples=5",
        f"--training.micro_batch_size={micro}",
        f"--training.global_batch_size={2 * micro}",
        f"--parallel.zero_stage={stage if pipeline == 1 else min(stage, 1)}",
        f"--parallel.pipeline={pipeline}",
    ]
    config, parts = open_parts(read_config([*arguments, *overrides]))
    model = build_model(config, parts, mesh, None)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            scale = 1.0 if name.startswith("router") else 0.1
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    return config, parts, model


def validated(mesh: Mesh, arguments: list[str], cases: list[tuple[int, int, int]]) -> list:
    """Of every case, on this rank: the tally of a validation, of the first sequences of a training step, by `exact`."""
    tallies = []
    for case in cases:
        config, parts, model = prepared(arguments, *case, mesh)
        engine = Engine(Objective(model), config, mesh)
        boundary = Boundary(StopSignals(), None, mesh)
        rule = engine.rule("soft")
        validation = Validation(config, mesh, parts.datasets["valid"], engine, boundary, Watchdog(0))
        tally, without = (validation.measure(rule, each_step) for each_step in (True, False))
        assert without == tally._replace(own_losses=[0] * 3, first_squared=0, steps_first=0)
        own = step_batch(config).chunk(mesh.data.size)[mesh.data.rank].split(config.training.micro_batch_size)
        exact = validation.run_exact(engine.rule("hard")) if CASES.index(case) in EXACT else None
        tallies.append((tally, measure_each_step(mesh, engine, own, 1, rule), exact))
    return tallies


def step_batch(config: Config) -> torch.Tensor:
    """Tokens of a training step, int64 (2 micro-batches of 2 data-parallel ranks, L + 1)."""
    count = 4 * config.training.micro_batch_size
    return random_tokens(count, config.data.sequence_length + 1, config.model.vocab_size)


@pytest.fixture(scope="module")
def arguments(corpus, tmp_path_factory) -> list[str]:
    return tiny_arguments(corpus, tmp_path_factory.mktemp("run"), data__sequence_length=64, data__split="97,3,0")


@pytest.fixture(scope="module", params=[(1, 1), (2, 1), (1, 2)], ids=["alone", "two data ranks", "two pipeline ranks"])
def ranks(request) -> tuple[int, int]:
    """Data-parallel and pipeline ranks."""
    return request.param


@pytest.fixture(scope="module")
def tallies(ranks, arguments) -> list[list]:
    """By rank and case."""
    data, pipeline = ranks
    return run_distributed(validated, data * pipeline, arguments, CASES, pipeline=pipeline, time_limit=300)


@functools.cache
def evaluated(arguments: tuple[str, ...], case: tuple[int, int, int]) -> tuple[int, Evaluation, list[int]]:
    """Of a case: how many samples there are, their evaluation in one process, and how many tokens take each K̂."""
    config, parts, model = prepared(arguments, *case)
    dataset = parts.datasets["valid"]
    count = min(case[0], dataset.samples_per_epoch)
    soft = model.rule("soft")
    r = config.ponder_training.evaluation_refinements
    want = evaluate(model, validation_batches(dataset, count, 5, 0, 1), Setting(soft, r))
    routed = [
        model.jacobi(tokens[:, :-1], r, soft).routing.executed.flatten()
        for tokens in validation_batches(dataset, count, 64, 0, 1)
    ]
    assert want.tokens == count * config.data.sequence_length
    return count, want, torch.bincount(torch.cat(routed), minlength=3).tolist()


@pytest.mark.parametrize("index", range(len(CASES)), ids=[f"{s}-by-{m}-zero{z}" for s, m, z in CASES])
def test_every_sample_once_and_as_in_evaluation(tallies, arguments, index):
    count, want, histogram = evaluated(tuple(arguments), CASES[index])
    assert min(histogram) > 0 or count < 8
    for rank in tallies:
        tally, *_ = rank[index]
        assert tally.tokens == want.tokens
        assert tally.mean_loss == pytest.approx(want.cross_entropy, rel=1e-6)
        assert tally.steps == histogram


@pytest.mark.parametrize("index", range(len(CASES)), ids=[f"{s}-by-{m}-zero{z}" for s, m, z in CASES])
def test_the_first_sequences_of_a_training_step_tell_what_each_step_predicts(ranks, tallies, arguments, index):
    data, pipeline = ranks
    config, _, model = prepared(arguments, *CASES[index])
    micro_batches = [tokens[: max(1, len(tokens) // 8)] for tokens in step_batch(config).chunk(4)]
    first = torch.cat([micro_batches[rank * 4 // data + place] for rank in range(data) for place in range(pipeline)])
    with torch.no_grad():
        want = Tally.of(Objective(model)(first, 1, model.rule("soft"), each_step=True)[1].sum(0))
    assert min(want.own_losses) > 0
    for rank in tallies:
        _, tally, _ = rank[index]
        assert tally.steps == want.steps
        assert tally.own_losses == pytest.approx(want.own_losses, rel=1e-5)
        assert tally.steps_follow_loss == pytest.approx(want.steps_follow_loss, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("index", EXACT)
def test_the_fixed_point_and_the_refinements_of_training_on_the_same_samples(tallies, arguments, index):
    """Of a model that refinements change, whatever the grid."""
    config, parts, model = prepared(arguments, *CASES[index])
    hard, r = model.rule("hard", bias=0.0), config.ponder_training.evaluation_refinements
    batches = [*validation_batches(parts.datasets["valid"], EXACT[index], 5, 0, 1)]
    exact, trained, unrefined = (evaluate(model, batches, Setting(hard, way)) for way in (None, r, 0))
    assert abs(exact.cross_entropy - unrefined.cross_entropy) > 1e-4
    for rank in tallies:
        *_, found = rank[index]
        for tally, want in zip(found, (exact, trained), strict=True):
            assert tally.tokens == want.tokens
            assert tally.mean_loss == pytest.approx(want.cross_entropy, rel=1e-6)
            assert tally.mean_steps == pytest.approx(want.mean_steps)
