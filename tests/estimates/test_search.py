"""Layouts that fit, against the checks and the memory that training itself has."""

import itertools

import pytest

from megatron_ponder.base.errors import UserError
from megatron_ponder.base.launch import Launch
from megatron_ponder.cluster.hardware import Hardware
from megatron_ponder.config import Config, check_layout, data_parallel_size, read_config, resolve, validate
from megatron_ponder.estimates.memory import memory_estimate
from megatron_ponder.estimates.rank import Rank
from megatron_ponder.estimates.search import Plan, changes, check_ranks, fitting, flags, nearest, plan_of

CLUSTER = Hardware("GPU", 2, 8, 40e9, 300e12, 2e12, 300e9, 25e9)
ARGUMENTS = {
    "model.hidden_size": 1024, "model.num_layers": 24, "model.num_heads": 16, "model.vocab_size": 32000,
    "training.global_batch_size": 64, "training.micro_batch_size": 4,
}  # fmt: skip


def config_for(**overrides) -> Config:
    values = ARGUMENTS | {key.replace("__", "."): value for key, value in overrides.items()}
    return read_config([f"--{key}={value}" for key, value in values.items()])


@pytest.fixture(scope="module")
def plans():
    return fitting(config_for(), CLUSTER)


def test_every_layout_is_allowed_and_fits(plans):
    assert len(plans) > 50
    for plan in plans:
        config = plan.config
        assert validate(resolve(config)) == config
        check_layout(config, Launch(world_size=16, local_size=8))
        assert data_parallel_size(config, 16) == plan.data
        needed = [
            memory_estimate(Rank(config, plan.data, place, "cuda")).total for place in range(config.parallel.pipeline)
        ]
        assert max(needed) == plan.memory.total <= CLUSTER.usable_memory
    layouts = {(p.config.parallel.tensor, p.config.parallel.pipeline) for p in plans}
    assert {(1, 1), (8, 1), (2, 2), (1, 4)} <= layouts
    assert len({str(plan.config) for plan in plans}) == len(plans)


def test_they_are_in_order(plans):
    seconds = [plan.time.total for plan in plans]
    assert all(after > 0.98 * before for before, after in itertools.pairwise(seconds))
    assert seconds[0] < 0.7 * seconds[-1]


def test_context_ranks_where_fewer_do_not_fit(plans):
    assert all(plan.config.parallel.context == 1 for plan in plans)
    node = Hardware("GPU", 1, 8, 40e9, 300e12, 2e12, 300e9, 25e9)
    few = config_for(training__global_batch_size=2, training__micro_batch_size=1, data__sequence_length=8192)
    found = [plan for plan in fitting(few, node) if plan.config.parallel.context > 1]
    assert {plan.config.training.micro_batch_size for plan in found} == {1}
    assert all(plan.data * plan.config.parallel.context * ranks_beside(plan) == 8 for plan in found)
    alone = {plan.config.parallel.context for plan in found if ranks_beside(plan) == 1}
    assert min(alone) == 4  # the fewest with which there are as many sequences as data ranks


def ranks_beside(plan: Plan) -> int:
    """Ranks that share a layer or the stack."""
    return plan.config.parallel.tensor * plan.config.parallel.pipeline


def test_less_memory_allows_fewer(plans):
    small = Hardware("GPU", 2, 8, 12e9, 300e12, 2e12, 300e9, 25e9)
    fewer = fitting(config_for(), small)
    same = {str(plan.config) for plan in fewer if plan.config.parallel.context == 1}
    assert same < {str(plan.config) for plan in plans}
    assert fewer[0].time.total >= 0.99 * plans[0].time.total
    assert fitting(config_for(), Hardware("GPU", 2, 8, 1e8, 300e12, 2e12, 300e9, 25e9)) == []


def test_the_nearest_changes_least(plans):
    config = config_for(training__micro_batch_size=4)
    assert plan_of(config, CLUSTER).memory.total > CLUSTER.usable_memory
    found = nearest(config, plans)
    changed = changes(config, found.config)
    assert len(changed) == min(len(changes(config, plan.config)) for plan in plans) == 1
    again = read_config([f"--{key}={value}" for key, value in ARGUMENTS.items()] + flags(changed).split())
    assert again == found.config
    assert nearest(config, []) is None


def test_flags_undo_what_a_layout_cannot_keep():
    config = config_for(
        parallel__pipeline=2, parallel__pipeline_layers="[10,14]", parallel__zero_stage=0, training__precision="fp32"
    )
    plan = next(plan for plan in fitting(config, CLUSTER) if plan.config.parallel.pipeline == 1)
    assert changes(config, plan.config)["parallel.pipeline_layers"] is None
    assert "--parallel.pipeline_layers null" in flags(changes(config, plan.config))


def test_ranks_that_do_not_divide_are_refused_with_what_would():
    with pytest.raises(UserError, match=r"add --parallel\.tensor 4"):
        check_ranks(config_for(parallel__tensor=8), Hardware("GPU", 3, 4, 40e9, 300e12, 2e12, 300e9, 25e9))


@pytest.mark.slow
def test_ten_thousand_gpus_are_searched():
    cluster = Hardware("GPU", 1250, 8, 40e9, 300e12, 2e12, 300e9, 25e9)
    assert fitting(config_for(training__global_batch_size=20_000), cluster)
