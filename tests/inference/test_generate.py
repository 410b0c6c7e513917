"""Generation: batches, sampling and refusals."""

import pytest
import torch

from megatron_ponder.errors import UserError
from megatron_ponder.inference.generate import generate
from megatron_ponder.inference.sampling import Sampling, choose
from tests.models import random_tokens, small_model


@pytest.mark.parametrize("mode", ["adaptive", "fixed", "vanilla"])
def test_batch_equals_one_at_a_time(mode):
    model = small_model(router_scale=3.0, ponder__mode=mode, ponder__max_steps=3, ponder__threshold=0.2)
    prompts = [random_tokens(1, length, seed=length)[0].tolist() for length in (1, 5, 9, 2)]
    together = generate(model, prompts, 12)
    assert together == [generate(model, [prompt], 12)[0] for prompt in prompts]
    for result in together:
        assert len(result.tokens) == 12
        assert result.cached_slots == len(result.executed_steps) + sum(result.executed_steps)
    if mode == "adaptive":
        assert len({step for result in together for step in result.executed_steps}) > 2


def test_greedy_is_the_argmax_of_exact_evaluation():
    model = small_model(router_scale=3.0, ponder__threshold=0.2)
    tokens = random_tokens(1, 4)
    for expected in generate(model, [tokens[0].tolist()], 6)[0].tokens:
        output = model.exact(tokens, model.pruning(hard=True)).output_BLH[:, -1]
        assert int(model.head(output).argmax()) == expected
        tokens = torch.cat([tokens, torch.tensor([[expected]])], 1)


def test_stop_token_ends_its_sequence_alone():
    model = small_model()
    prompts = [[1, 2], [3, 4], [5]]
    free = generate(model, prompts, 8)
    stop = free[1].tokens[2]
    stopped = generate(model, prompts, 8, stop_id=stop)
    for before, after in zip(free, stopped, strict=True):
        end = before.tokens.index(stop) + 1 if stop in before.tokens else 8
        assert after.tokens == before.tokens[:end]


def test_sampling_depends_on_its_seed_only():
    model = small_model()
    hot = Sampling(temperature=1.5, seed=3)
    alone = generate(model, [[1, 2]], 10, sampling=hot)[0]
    assert generate(model, [[9], [1, 2], [4, 5, 6]], 10, sampling=hot)[1] == alone
    assert generate(model, [[1, 2]], 10, sampling=Sampling(temperature=1.5, seed=4))[0].tokens != alone.tokens


def test_top_k_and_top_p_restrict_the_choice():
    logits = torch.tensor([0.1, 3.0, 2.0, 2.9])
    generator = torch.Generator().manual_seed(0)
    drawn = {choose(logits, Sampling(temperature=2.0, top_k=2), generator) for _ in range(200)}
    assert drawn == {1, 3}
    drawn = {choose(logits, Sampling(temperature=1.0, top_p=0.5), generator) for _ in range(200)}
    assert drawn == {1, 3}  # 0.42 of the probability is with token 1, which is less than half
    drawn = {choose(logits, Sampling(temperature=5.0), generator) for _ in range(400)}
    assert drawn == {0, 1, 2, 3}


def test_bad_requests_are_refused():
    model = small_model()
    with pytest.raises(UserError, match="empty"):
        generate(model, [[1], []], 4)
    with pytest.raises(UserError, match="is meant for 64"):
        generate(model, [[1] * 60], 5)
    with pytest.raises(UserError, match="top_p"):
        Sampling(top_p=0)


def test_positions_restart_after_a_document():
    model = small_model(eod_id=7)
    assert generate(model, [[3, 7, 5, 6]], 5)[0].tokens == generate(model, [[5, 6]], 5)[0].tokens
