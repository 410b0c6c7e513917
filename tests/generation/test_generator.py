"""A batch whose sequences come and go equals sequential decoding of one at a time, on any ranks."""

import pytest
import torch

from megatron_ponder.base.errors import UserError
from megatron_ponder.generation.generator import Generator
from megatron_ponder.generation.request import Request
from megatron_ponder.generation.sequences import Batching
from megatron_ponder.parallel.mesh import Mesh
from tests.distributed import run_distributed
from tests.generation.arrivals import EXITS, MODELS, expected, generated
from tests.generation.sequential import continue_greedily
from tests.models import random_tokens, small_model

LAYOUTS = {"tp2": (2, 1), "pp2": (1, 2), "tp2-pp2": (2, 2), "pp3": (1, 3)}


def check(results, name, tolerance):
    got, held = results
    assert held == 0
    for (tokens, values, steps), (want_tokens, want_values, want_steps) in zip(got, expected(name), strict=True):
        assert tokens == want_tokens
        assert steps == want_steps
        assert values == pytest.approx(want_values, abs=tolerance)
    if "adaptive" in name or name in EXITS:
        assert {step for _, _, steps in got for step in steps} == {0, 1, 2, 3}


# In fp32 the same is computed with other rounding: two of them stand for all that are slow.
QUICK_IN_FP32 = ("llama-adaptive", "gpt_neox-fixed")
# Of which another test compares tokens and what the cache holds.
HELD = ("llama-sps",)


@pytest.mark.parametrize("sequential", [True, False], ids=["slots", "jacobi"])
@pytest.mark.parametrize(
    ("name", "dtype", "tolerance"),
    [
        pytest.param(name, torch.float64, 1e-9, id=f"{name}-fp64", marks=[pytest.mark.slow] if name in HELD else [])
        for name in MODELS
    ]
    + [
        pytest.param(
            name,
            torch.float32,
            1e-4,
            id=f"{name}-fp32",
            marks=[] if name in QUICK_IN_FP32 else pytest.mark.slow,
        )
        for name in MODELS
    ],
)
def test_one_process(name, dtype, tolerance, sequential):
    check(generated(Mesh(), name, dtype, sequential), name, tolerance)


@pytest.mark.parametrize(
    ("name", "layout", "dtype", "tolerance", "sequential"),
    [
        pytest.param(
            name,
            layout,
            dtype,
            tolerance,
            sequential,
            marks=[] if (name, layout, tolerance, sequential) in QUICK else pytest.mark.slow,
            id=f"{name}-{layout}-{'fp64' if tolerance < 1e-6 else 'fp32'}-{'slots' if sequential else 'jacobi'}",
        )
        for QUICK in [
            {
                ("llama-adaptive", "tp2", 1e-9, False),
                ("gpt_neox-adaptive", "pp2", 1e-9, False),
                ("gpt_neox-fixed", "tp2", 1e-4, True),
                ("llama-fixed", "pp2", 1e-4, False),
                ("llama-ponderlm", "tp2-pp2", 1e-9, False),
            }
        ]
        for name in MODELS
        for layout in LAYOUTS
        for dtype, tolerance in [(torch.float64, 1e-9), (torch.float32, 1e-4)]
        for sequential in (True, False)
    ],
)
def test_ranks(name, layout, dtype, tolerance, sequential):
    tensor, pipeline = LAYOUTS[layout]
    results = run_distributed(generated, tensor * pipeline, name, dtype, sequential, tensor=tensor, pipeline=pipeline)
    assert results[1:] == [None] * (tensor * pipeline - 1)
    check(results[0], name, tolerance)


def test_a_router_that_reads_the_token_alone_is_refused():
    with pytest.raises(UserError, match="router_input token, a control that cannot generate"):
        Generator(small_model(ponder__router_input="token").eval())


@pytest.mark.parametrize("overrides", [{"ponder__mode": "sps"}, {"ponder__latent_visibility": "own"}])
def test_slots_that_their_own_token_sees_are_kept_no_longer(overrides):
    model = small_model(router_scale=3.0, ponder__latent_steps=3, inference__threshold=0.2, **overrides).eval()
    prompt = random_tokens(1, 7)[0].tolist()
    held, reserved = [], []
    # 37 tokens, of which each may run 4 slots
    with Generator(model, batching=Batching(max_slots=40, prefix_slots=0)) as generator:
        sequence = generator.submit(Request(tuple(prompt), 30))
        while sequence.generation.finish_reason is None:
            generator.step()
            held.append(generator.cached_slots)
            reserved.append(generator._runners[0].cache.reserved)
    tokens, _, executed = continue_greedily(model, model.rule("hard"), prompt, 30)
    assert sequence.generation.tokens == tokens
    assert sum(executed) > len(executed)
    assert max(held) <= 36 + 3 and max(reserved) == 64
    assert sequence.generation.cached_slots == 36
