"""Counted operations against PyTorch's own count of what really runs."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from megatron_ponder.estimates.flops import block_flops, forward_flops, head_flops, training_flops
from megatron_ponder.estimates.part import part_sizes
from megatron_ponder.estimates.rank import slots_of_passes
from megatron_ponder.model.passes import pass_slots
from megatron_ponder.model.tally import Tally
from megatron_ponder.training.objective import Objective
from tests.models import random_tokens, small_config, small_model

BATCH, LENGTH = 2, 40
R = 1
CASES = [
    {"ponder__mode": "vanilla"},
    {"ponder__mode": "fixed"},
    {"ponder__mode": "pause"},
    {"ponder__mode": "loop"},
    {"ponder__mode": "ponderlm"},
    {},
    {"model__family": "gpt_neox"},
    {"ponder__router_hidden_size": 24},
    {"ponder_training__gradient_passes": 2},
    {"model__num_kv_heads": 2, "ponder__mode": "vanilla"},
    {"ponder__latent_visibility": "own"},
    {"ponder__latent_visibility": "own", "ponder__mode": "fixed"},
    {"ponder__latent_visibility": "own", "ponder_training__gradient_passes": 2},
]


class Modules:
    """In place of the counter's own account of modules, which does not bear passes without gradients."""

    parents = frozenset({"Global"})

    def __enter__(self) -> "Modules":
        return self

    def __exit__(self, *_) -> None:
        pass


def counted(overrides: dict) -> tuple[float, float]:
    """Products of two matrices, and of stacks of them, in a training step as it runs."""
    settings = {"data__sequence_length": LENGTH, **overrides}
    model = small_model(**settings)
    counter = FlopCounterMode(display=False)
    counter.mod_tracker = Modules()
    objective = Objective(model, overrides.get("ponder_training__gradient_passes"))
    with counter, sdpa_kernel(SDPBackend.MATH):  # of PyTorch's fused kernels on a CPU nothing is counted
        loss, _ = objective(random_tokens(BATCH, LENGTH + 1), R, model.rule("soft"))
        loss.backward()
    by_operation = {str(operation): count for operation, count in counter.get_flop_counts()["Global"].items()}
    weights = sum(count for name, count in by_operation.items() if name in ("aten.mm", "aten.addmm"))
    return weights, sum(by_operation.values()) - weights


@pytest.mark.parametrize("overrides", CASES, ids=lambda o: "-".join(map(str, o.values())) or "adaptive")
def test_products_with_weights_are_those_that_run(overrides):
    config = small_config(data__sequence_length=LENGTH, training__global_batch_size=BATCH, **overrides)
    passes = forward_flops(config, R)
    trained = config.ponder_training.gradient_passes or len(passes)
    expected = sum(flops.matrices for flops in passes[:-trained])
    expected += 3 * sum(flops.matrices for flops in passes[-trained:]) + 3 * head_flops(config)
    options = config.ponder.latent_steps + 1
    fusion = 2 * LENGTH * config.model.hidden_size * options if config.ponder.mode == "adaptive" else 0
    weights, _ = counted(overrides)
    mixtures = 0
    if config.ponder.mode == "ponderlm":  # K times over all 61 tokens, looked up and added
        mixtures = 2 * LENGTH * config.model.hidden_size * 61 * config.ponder.latent_steps
    assert weights == BATCH * (expected - 3 * (fusion + mixtures))  # stacks of products, and none at all


@pytest.mark.parametrize("mode", ["vanilla", "fixed", "adaptive", "pause", "loop", "ponderlm"])
def test_attention_is_what_runs_but_for_what_an_implementation_adds(mode):
    config = small_config(data__sequence_length=LENGTH, ponder__mode=mode)
    slots = [(LENGTH * run, LENGTH * kept) for run, kept in slots_of_passes(config, R)]
    expected = 0.0
    for index, ((run, _), flops) in enumerate(zip(slots, forward_flops(config, R), strict=True)):
        square = flops.attention * 2 * run / (run + 1)
        head = config.model.head_size
        folded = (head + 8) / head if mode == "adaptive" and index > 0 else 1
        expected += 6 / 2 * square * folded  # of 2 products forward; 4 backward
    if mode == "adaptive":
        expected += 3 * 2 * LENGTH * config.model.hidden_size * (config.ponder.latent_steps + 1)
    _, stacks = counted({"ponder__mode": mode})
    assert stacks == pytest.approx(BATCH * expected, rel=1e-12)


@pytest.mark.parametrize(
    ("overrides", "steps"),
    [
        ({"ponder__mode": "sps"}, [(0, 1, 2, 3)]),
        ({"ponder__latent_visibility": "own"}, [(0,), (1,), (2,), (3,)]),
        (
            {"ponder__latent_visibility": "own", "parallel__pipeline": 2, "training__global_batch_size": 2},
            [(0,), (0, 1), (0, 1, 2), (0, 1, 2, 3)],
        ),
        (
            {"ponder__latent_visibility": "own", "ponder_training__gradient_passes": 3},
            [(0,), (0, 1), (0, 1, 2), (0, 1, 2, 3)],
        ),
    ],
    ids=["sps", "once", "pipeline", "cut"],
)
def test_attention_of_slots_that_their_own_token_sees_by_a_loop(overrides, steps):
    config = small_config(data__sequence_length=LENGTH, ponder__latent_steps=3, **overrides)
    for flops, run in zip(forward_flops(config, R), steps, strict=True):
        pairs = sum(token + 1 + step for token in range(LENGTH) for step in run)
        assert flops.attention == config.model.num_layers * 4 * config.model.hidden_size * pairs
    assert [slots for slots, _ in slots_of_passes(config, 7)] == [len(run) for run in steps]


@pytest.mark.parametrize("refinements", [0, 3])
def test_slots_that_are_run_once_and_pruned(refinements):
    config = small_config(ponder__latent_visibility="own", ponder__latent_steps=4)
    slots = slots_of_passes(config, refinements, mean_steps=1.25)
    assert slots == [(1, 1), (1, 1), (0.25, 0.25), (0, 0), (0, 0)]
    whole, pruned = (sum(part.matrices for part in forward_flops(config, 0, mean_steps=m)) for m in (None, 0.0))
    assert whole > 4 * pruned


def test_a_step_by_hand():
    config = small_config(ponder__mode="fixed", data__sequence_length=8, training__global_batch_size=6)
    # K = 2, R = 1: passes of 1, 2, 3, 3 slots; the last block finishes 1, 2, 2 and 1 of them
    assert slots_of_passes(config, 1) == [(1, 1), (2, 2), (3, 2), (3, 1)]
    sequence = 0
    for slots, kept in ((1, 1), (2, 2), (3, 2), (3, 1)):
        inner, last = 8 * slots, 8 * kept
        weights = 4 * 32 * 32 + 3 * 32 * 48
        sequence += 2 * inner * weights + 2 * inner * 3 * 32 * 32 + 2 * last * (32 * 32 + 3 * 32 * 48)
        sequence += 2 * sum(4 * 32 * (query + 1) for query in range(inner))
    sequence += 2 * 8 * 32 * 61
    assert training_flops(config, 1) == 3 * 6 * sequence


def test_cost_in_passes():
    # K (K + 1) / 2 + (R + 1) (K + 1) times the slots of one pass
    for steps, refinements in ((1, 0), (3, 2), (4, 3)):
        slots = sum(pass_slots(steps, refinements))
        assert slots == steps * (steps + 1) / 2 + (refinements + 1) * (steps + 1)
    config = small_config()
    block = part_sizes(config.model, config.ponder).block
    once, twice = (block_flops(block, run, run).matrices for run in (100, 200))
    assert twice == 2 * once


def test_more_steps_and_refinements_cost_more():
    for costs in (
        [training_flops(small_config(ponder__latent_steps=k), 1) for k in (1, 2, 3)],
        [training_flops(small_config(), r) for r in (0, 1, 2)],
    ):
        assert costs == sorted(set(costs))


@pytest.mark.parametrize(("refinements", "visibility"), [(0, "all"), (2, "all"), (0, "own")])
def test_pruned_products_with_weights_are_those_that_run(refinements, visibility):
    """Where every token keeps one latent step of three."""
    settings = {"data__sequence_length": LENGTH, "training__global_batch_size": BATCH, "ponder__latent_steps": 3}
    settings |= {"ponder__latent_visibility": visibility}
    config, model = small_config(**settings), small_model(**settings)
    with torch.no_grad():
        model.router.output.weight.zero_()
        model.router.output.bias.copy_(torch.tensor([0.0, 5.0, -90.0, -90.0]))
    counter = FlopCounterMode(display=False)
    counter.mod_tracker = Modules()
    with counter:
        loss, sums = Objective(model, packed=True)(random_tokens(BATCH, LENGTH + 1), refinements, model.rule("hard"))
        loss.backward()
    assert Tally.of(sums.sum(0)).mean_steps == 1
    operations = counter.get_flop_counts()["Global"].items()
    weights = sum(count for name, count in operations if str(name) in ("aten.mm", "aten.addmm"))
    passes = forward_flops(config, refinements, mean_steps=1.0)
    fusion = 2 * LENGTH * config.model.hidden_size * 4
    expected = BATCH * (sum(flops.matrices for flops in passes) - fusion + head_flops(config))
    if visibility == "own":  # two tokens run the two steps that nobody takes
        expected += 2 * 2 * passes[1].matrices / LENGTH
    assert weights == 3 * expected
    assert training_flops(config, refinements, mean_steps=3.0) == training_flops(config, refinements)
