"""The formula for FLOPs, against a loop over cached slots."""

import pytest
import torch

from megatron_ponder.evaluation.inference_flops import inference_flops
from tests.models import random_tokens, small_model


@pytest.mark.parametrize("exits", [False, True])
@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_formula_by_a_loop_over_cached_slots(family, exits):
    model = small_model(model__family=family)
    config = model.model_config
    blocks = sum(parameter.numel() for parameter in model.transformer.blocks.parameters())
    executed = torch.tensor([[0, 2, 1, 0, 2], [2, 2, 0, 0, 0]])
    got = inference_flops(executed, model, exits)
    for row, sequence in enumerate(executed.tolist()):
        cached = 0
        for position, steps in enumerate(sequence):
            want = 2 * config.vocab_size * config.hidden_size * (steps + 1 if exits else 1)
            for _ in range(steps + 1):
                cached += 1  # the slot sees itself
                want += 2 * blocks + 4 * config.num_layers * config.hidden_size * cached
            assert got[row, position] == want


def test_more_steps_cost_more_and_later_tokens_too():
    model = small_model()
    fewer, more = (inference_flops(torch.full((1, 6), steps), model) for steps in (0, 1))
    assert (more > fewer).all()
    assert (fewer.diff() > 0).all()
    assert inference_flops(random_tokens(2, 5) % 3, model).shape == (2, 5)
