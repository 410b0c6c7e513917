"""A step whose loss or gradients are not finite on one rank leaves no trace on any, in every layout."""

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from itertools import cycle

import pytest
import torch
from torch import Tensor

from megatron_ponder.checkpoint.run_state import RunState
from megatron_ponder.config import TrainingConfig
from megatron_ponder.model import ends
from megatron_ponder.model.ponder import PonderLM
from megatron_ponder.model.router import Rule
from megatron_ponder.model.tally import Tally
from megatron_ponder.model.transformer import Recompute
from megatron_ponder.parallel.mesh import Mesh
from megatron_ponder.training.deepspeed_engine import Engine
from megatron_ponder.training.objective import Objective
from megatron_ponder.training.schedules import training_rule
from megatron_ponder.training.skipped_steps import SkippedSteps
from megatron_ponder.training.state import state_of
from tests.models import random_tokens, small_model
from tests.training.layouts import LENGTH, MODELS, MUON, RATE, Layout, batch_of, model_for

LLAMA = MODELS["llama adaptive"]
# Modules whose activations, and weights, go wrong.
SITES = [f"{name}{what}" for name in ("embedding", "transformer", "router", "head") for what in ("", " weight")]
OTHERS = {
    "fixed": MODELS["llama fixed"],
    "pruned": LLAMA | {"ponder_training__prune_start": 0},
    "all": MODELS["llama ponderlm"],
}
VALUES = (math.nan, math.inf, -math.inf)
MODES_OF = ("vanilla", "fixed", "adaptive", "pause", "sps", "loop", "ponderlm")
STAGES = {
    f"zero{stage} {precision}": LLAMA | {"parallel__zero_stage": stage, "training__precision": precision}
    for stage in (0, 1, 2, 3)
    for precision in ("fp32", "bf16")
    if (stage, precision) != (0, "bf16")  # which is stage 1
}
OF_MUON = {
    f"zero{stage} muon {precision}": LLAMA | MUON | {"parallel__zero_stage": stage, "training__precision": precision}
    for stage, precision in ((0, "fp32"), (1, "bf16"))
}
REST = ("zero2 fp32", "zero3 fp32")  # whose optimisers are those of stage 1 in fp32, and of stage 3 in bf16
LAYOUTS = {
    "tensor": (Layout(tensor=2), {"fp32": LLAMA} | OTHERS | OF_MUON),
    "pipeline": (
        Layout(tensor=1, pipeline=2, data=2),
        {name: LLAMA | {"training__precision": name} for name in ("fp32", "bf16")} | OTHERS | OF_MUON,
    ),
    "data": (Layout(data=2), {name: STAGES[name] for name in REST} | OF_MUON),
    "all": (
        Layout(tensor=2, pipeline=2, sequence_parallel=True),
        {f"zero{stage}": LLAMA | {"parallel__zero_stage": stage} for stage in (0, 1)},
    ),
}


class BadGradient(torch.autograd.Function):
    """The same numbers, with gradients of which one is not a number."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        grad = grad.clone()
        grad.view(-1)[0] = math.nan
        return grad


def faulty(fault: str, losses=ends.vocab_parallel_cross_entropy):
    """A cross-entropy that goes wrong in its gradient alone, or in its value alone."""

    def cross_entropy(*args, **kwargs):
        losses_BL = losses(*args, **kwargs)
        return BadGradient.apply(losses_BL) if fault == "gradient" else losses_BL + math.inf

    return cross_entropy


@contextmanager
def at_fault(fault: str, engine: Engine) -> Iterator[None]:
    """Have a fault: what `spoilt` does to a part of the model, or what `faulty` does."""
    sound = ends.vocab_parallel_cross_entropy
    if fault in ("loss", "gradient"):
        ends.vocab_parallel_cross_entropy = faulty(fault)
    try:
        with spoilt(engine.model, fault) if fault in SITES else nullcontext():
            yield
    finally:
        ends.vocab_parallel_cross_entropy = sound


@contextmanager
def spoilt(model: PonderLM, site: str, value: float = math.nan) -> Iterator[None]:
    """Have a number that is none in what a module gives, or in a weight; where this part has none such, in its blocks.

    Args:
        model: or this rank's part of it.
        site: one of `SITES`.
        value: in place of a number.
    """
    module = {"embedding": model.embedding, "router": model.router, "head": model.head}.get(site.split()[0])
    module = module or model.transformer
    parameter = next(module.parameters())
    # ZeRO 3 has some weights twice, of which one would stay spoilt.
    if site.endswith("weight") and not hasattr(parameter, "ds_tensor"):
        weight = parameter.detach().flatten()
        before, weight[::7] = weight.clone(), value
        yield
        weight.copy_(before)
    elif module is model.head:  # whose result is a loss already
        hook = module.register_forward_pre_hook(lambda _module, inputs: (with_one(inputs[0], value), *inputs[1:]))
        yield
        hook.remove()
    else:
        hook = module.register_forward_hook(lambda _module, _inputs, output: with_one(output, value))
        yield
        hook.remove()


def with_one(x: Tensor, value: float) -> Tensor:
    other = torch.zeros_like(x)
    other[0, 0, 0] = value
    return x + other


def steps(mesh: Mesh, layout: Layout, case: dict, faults: dict[int, str]) -> tuple[list[float], dict]:
    """Norms of five steps, of which those with a fault have it on the last rank alone, and the state after all."""
    config = layout.config(case)
    engine = Engine(Objective(model_for(config, mesh), packed=True), config, mesh)
    norms, last = [], torch.distributed.get_rank() == torch.distributed.get_world_size() - 1
    for step in range(5):
        fault = faults.get(step)
        if fault == "none":
            continue
        tokens = torch.chunk(batch_of(config, step), mesh.data.size)[mesh.data.rank]
        with at_fault(fault, engine) if fault is not None and last else nullcontext():
            scale = 1 / (config.training.global_batch_size * LENGTH)
            micro_batches = tokens.split(config.training.micro_batch_size)
            engine.forward_backward(micro_batches, 1, training_rule(step, config), 0.05, scale)
            norms.append(engine.step(RATE))
            if fault in SITES:  # nothing is learnt from it, and it is no number on the rank that has it
                sums = engine.evaluate(micro_batches[:1], 1, 1, engine.rule("hard"), each_step=True)
                assert not (last and sums.isfinite().all())
    return norms, {(item.kind, item.name): item.tensor.clone() for item in state_of(engine)}


def compare(mesh: Mesh, layout: Layout, cases: dict[str, dict], sites: list[str] = SITES) -> dict[str, list]:
    """Norms with faults, and what differs in the end from a run that never took the steps with faults."""
    seen, faults = {}, cycle(sites)
    for name, case in cases.items():
        fault = next(faults)
        norms, got = steps(mesh, layout, case, {0: "loss", 2: "gradient", 3: fault})
        norms_without, want = steps(mesh, layout, case, dict.fromkeys((0, 2, 3), "none"))
        differing = [key for key, tensor in want.items() if not torch.equal(got[key], tensor)]
        finite = all(tensor.isfinite().all() for tensor in want.values())
        seen[name] = [norms, norms_without, differing, finite and len(want) == len(got) > 0]
    return seen


def check(ranks: list[dict], cases: dict) -> None:
    for seen in ranks:
        for name in cases:
            norms, norms_without, differing, finite = seen[name]
            assert [math.isfinite(norm) for norm in norms] == [False, True, False, False, True], name
            assert [norms[1], norms[4]] == norms_without, name
            assert differing == [], name
            assert finite, name


def test_a_fault_on_one_of_two_ranks_leaves_no_trace():
    cases = {name: case for name, case in STAGES.items() if name not in REST} | OTHERS
    check(Layout(data=2).run(compare, cases), cases)


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS)
def test_a_fault_on_the_last_rank_leaves_no_trace(name):
    layout, cases = LAYOUTS[name]
    check(layout.run(compare, cases), cases)


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("site", SITES)
def test_a_fault_anywhere_on_the_last_rank_leaves_no_trace(name, site):
    layout, cases = LAYOUTS[name]
    check(layout.run(compare, cases, [site]), cases)


@pytest.mark.parametrize("mode", MODES_OF)
def test_whatever_is_not_finite_gives_gradients_that_are_not(mode):
    """Another value at every site; all of them at all are slow."""
    model = small_model(ponder__mode=mode, model__num_layers=1)
    for index, site in enumerate(SITES):
        check_gradients(model, site, VALUES[index % 3])


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES_OF)
@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("recompute", ["none", "block", "attention"])
def test_the_same_for_every_value_and_recompute(mode, value, recompute):
    model = small_model(ponder__mode=mode, model__num_layers=1)
    model.recompute = Recompute(recompute)
    for site in SITES:
        if (site, value) != ("router", -math.inf):  # a step that is never taken, which is no fault
            check_gradients(model, site, value)


def check_gradients(model: PonderLM, site: str, value: float) -> None:
    """No exception by any rule, for nothing of it is an index, and a norm that is not finite."""
    tokens, wrapped = random_tokens(2, 6), Objective(model)
    rules = [Rule(kind, 0.3) for kind in ("soft", "hard", "all")]
    with spoilt(model, site, value=value):
        for rule in rules if model.router is not None else rules[:1]:
            model.zero_grad()
            loss, sums = wrapped(tokens, 0, rule, 0.05, each_step=True)
            loss.backward()
            norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
            assert not norm.isfinite(), (site, rule)
            tally = Tally.of(sums.sum(0))
            assert tally.tokens == 10
            assert math.isnan(tally.mean_loss) or tally.mean_loss == math.inf


def test_the_budget_counts_the_last_steps_only():
    state = RunState(skipped=[3, 40])
    skipped = SkippedSteps(state, TrainingConfig(skipped_steps_budget=2, skipped_steps_window=10))
    assert not skipped.note(51, 1.0)
    for step in (55, 56):
        assert skipped.note(step, math.nan)
        assert skipped.too_many(step) is None
    assert skipped.note(59, math.inf)
    assert state.skipped == [3, 40, 55, 56, 59]
    assert skipped.too_many(59).startswith("3 of the last 10 steps were skipped")
    assert skipped.too_many(64).startswith("3 of the last 10 steps")
    assert skipped.too_many(65) is None
