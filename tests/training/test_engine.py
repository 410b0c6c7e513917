"""DeepSpeed at every ZeRO stage computes what one process computes: loss, gradients, their norm, updated weights."""

import pytest
import torch

from megatron_ponder.model.ponder import PonderLM
from megatron_ponder.parallel.mesh import Mesh
from megatron_ponder.parallel.sharding import initialize
from megatron_ponder.training.engine import Engine
from megatron_ponder.training.objective import Objective, Tally
from tests.distributed import run_distributed
from tests.models import random_tokens, small_config

STEPS, BATCH, LENGTH, REFINEMENTS = 3, 8, 12, (2, 3, 2)


def config_for(**overrides):
    values = {
        "training__global_batch_size": BATCH,
        "training__micro_batch_size": 2,
        "training__precision": "fp32",
        "optimizer__gradient_clipping": 0.5,
        "data__sequence_length": LENGTH,
        "ponder__penalty_weight": 0.05,
    }
    return small_config(**(values | overrides))


def batch_of(step):
    return random_tokens(BATCH, LENGTH + 1, seed=step)


def model_for(config):
    model = PonderLM(config.model, config.ponder)
    initialize(model, seed=5)
    return model


def train_plainly(config):
    """The reference: PyTorch alone, the whole batch at once."""
    objective = Objective(model_for(config))
    parameters = dict(objective.model.named_parameters())
    groups = [
        {"params": [p for p in parameters.values() if p.dim() > 1], "weight_decay": config.optimizer.weight_decay},
        {"params": [p for p in parameters.values() if p.dim() <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-2, betas=config.optimizer.betas, eps=config.optimizer.epsilon)
    record = []
    for step in range(STEPS):
        pruning = objective.model.pruning(hard=False)
        total, sums = objective(batch_of(step), REFINEMENTS[step], pruning, config.ponder.penalty_weight)
        (total / (BATCH * LENGTH)).backward()
        gradients = {name: parameter.grad.clone() for name, parameter in parameters.items()}
        norm = torch.nn.utils.clip_grad_norm_(parameters.values(), config.optimizer.gradient_clipping)
        optimizer.step()
        optimizer.zero_grad()
        record.append((Tally.of(sums.sum(0)), gradients, float(norm)))
    return record, {name: parameter.detach() for name, parameter in parameters.items()}


def train_with_engine(mesh: Mesh, overrides: dict):
    """The same training on this rank's share, with gradient accumulation."""
    config = config_for(**overrides)
    engine = Engine(Objective(model_for(config)), config, mesh)
    own = BATCH // mesh.data.size
    record = []
    for step in range(STEPS):
        sums = 0
        for tokens in batch_of(step)[mesh.data.rank * own :][:own].split(config.training.micro_batch_size):
            pruning = engine.objective.model.pruning(hard=False)
            sums = sums + engine.forward_backward(
                tokens, REFINEMENTS[step], pruning, config.ponder.penalty_weight, 1 / (BATCH * LENGTH)
            )
        gradients = engine.full_gradients()
        norm = engine.step(learning_rate=1e-2)
        if mesh.data.size > 1:
            torch.distributed.all_reduce(sums)
        record.append((Tally.of(sums), gradients, norm))
    weights = {item.name: item.tensor.clone() for item in engine.state() if item.kind == "weight"}
    return record, weights


def train_in_all(mesh: Mesh, cases: list[dict]):
    return [train_with_engine(mesh, case) for case in cases]


CASES = [{"parallel__zero_stage": stage} for stage in (0, 1, 2, 3)] + [
    {"parallel__zero_stage": 2, "training__recompute": "block"},
    {"parallel__zero_stage": 3, "model__family": "gpt_neox"},
    {"parallel__zero_stage": 1, "ponder__mode": "fixed"},
]
LOW_PRECISION = [{"parallel__zero_stage": stage, "training__precision": "bf16"} for stage in (0, 1, 2, 3)]


@pytest.fixture(scope="module")
def two_ranks():
    """Every case on two data-parallel ranks, started once because importing DeepSpeed takes seconds."""
    return run_distributed(train_in_all, 2, CASES + LOW_PRECISION, time_limit=300)


def describe(case):
    return "-".join(f"{key.split('__')[1]}={value}" for key, value in case.items())


@pytest.mark.parametrize("index", range(len(CASES)), ids=[describe(case) for case in CASES])
def test_two_ranks_equal_one_process(two_ranks, index):
    want, want_weights = train_plainly(config_for(**CASES[index]))
    for rank in range(2):
        got, got_weights = two_ranks[rank][index]
        for (expected, expected_gradients, expected_norm), (tally, gradients, norm) in zip(want, got, strict=True):
            assert tally.cross_entropy == pytest.approx(expected.cross_entropy, rel=1e-5)
            assert tally.steps == expected.steps
            assert norm == pytest.approx(expected_norm, rel=1e-5)
            assert gradients.keys() == expected_gradients.keys()
            for name, gradient in expected_gradients.items():
                error = (gradients[name] - gradient).norm() / gradient.norm()
                assert error < 1e-4, (name, error)
        for name, weight in want_weights.items():
            assert (got_weights[name] - weight).abs().max() < 1e-5, name


@pytest.mark.parametrize("index", range(len(LOW_PRECISION)))
def test_bf16_stays_near_fp32_with_fp32_master_weights(two_ranks, index):
    want, want_weights = train_plainly(config_for())
    got, got_weights = two_ranks[0][len(CASES) + index]
    for (expected, _, expected_norm), (tally, _, norm) in zip(want, got, strict=True):
        assert tally.cross_entropy == pytest.approx(expected.cross_entropy, rel=2e-2)
        assert norm == pytest.approx(expected_norm, rel=5e-2)
    for name, weight in want_weights.items():
        assert got_weights[name].dtype == torch.float32
        assert (got_weights[name] - weight).abs().mean() < 5e-3, name
    assert any((weight != weight.bfloat16()).any() for weight in got_weights.values())


def test_one_rank_equals_one_process():
    config = config_for()
    want, want_weights = train_plainly(config)
    got, got_weights = run_distributed(train_with_engine, 1, {"parallel__zero_stage": 2})[0]
    assert got[-1][2] == pytest.approx(want[-1][2], rel=1e-5)
    assert max((got_weights[name] - weight).abs().max() for name, weight in want_weights.items()) < 1e-5
