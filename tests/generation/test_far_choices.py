"""What the last rank of a pipeline chooses is what one process chooses, whatever is asked of it."""

import pytest
import torch

from megatron_ponder.generation.far_choices import FarChooser, pack, packed_size, unpack
from megatron_ponder.generation.prefill import Prefill
from megatron_ponder.generation.request import Request
from megatron_ponder.generation.runner import Runner
from megatron_ponder.generation.sampling import Sampling
from megatron_ponder.generation.scheduler import Scheduler
from megatron_ponder.generation.sequences import Batching
from megatron_ponder.model.exits import Exit
from tests.models import random_tokens, small_model

RULES = [
    Sampling(),
    Sampling(temperature=1, seed=3),
    Sampling(repetition_penalty=1.7),
    Sampling(repetition_penalty=1.3, temperature=0.8, top_p=0.9, seed=4),
    Sampling(temperature=1.5, top_k=7, min_p=0.01, seed=5),
    Sampling(temperature=1, seed=6),
]
# Room for few of the sequences at a time, so that some are sent back to waiting and read again.
BATCHING = Batching(max_sequences=4, max_slots=220, prefill=Prefill(chunk=8, shortest=2))

EXIT = Exit("margin", 0.005)


def requests() -> list[Request]:
    prompts = [random_tokens(1, 3 + 4 * index, seed=index)[0].tolist() for index in range(len(RULES))]
    return [
        Request(tuple(prompt), 12, rule, top_log_probabilities=index % 3)
        for index, (prompt, rule) in enumerate(zip(prompts, RULES, strict=True))
    ]


def generated(model, far: bool) -> tuple[list[tuple], int, FarChooser]:
    """What comes of the requests, how often a sequence was sent back, and who chose."""
    rule = model.rule("hard", exit=EXIT if model.ponder_config.mode == "fixed" else None)
    scheduler = Scheduler(
        model.model_config,
        model.ponder_config,
        BATCHING,
        dtype=torch.float64,
        chooses=not far,
        exits=rule.exit is not None,
    )
    runner, chooser = (
        Runner(model, rule, BATCHING.max_sequences),
        FarChooser(model.model_config.vocab_size),
    )
    sequences = [scheduler.submit(request) for request in requests()]
    while (forward := scheduler.plan()) is not None:
        outcome = runner.finish(forward, runner.run(forward))
        if far:
            numbers = pack(forward, outcome, chooser.choose(forward, outcome))
            assert numbers.shape == (packed_size(forward, model.ponder_config.steps),)
            outcome = unpack(forward, numbers, model.ponder_config.steps)
        scheduler.settle(forward, outcome)
        if len(sequences[-1].generation.tokens) == 5:
            scheduler.cancel(sequences[-1])
    results = [
        (g.tokens, g.log_probabilities, g.top_log_probabilities, g.executed_steps, g.finish_reason)
        for g in (sequence.generation for sequence in sequences)
    ]
    return results, scheduler.usage.preempted, chooser


@pytest.mark.parametrize("mode", ["adaptive", "vanilla", "fixed"])
def test_far_choices_are_those_of_one_process(mode):
    model = small_model(router_scale=3.0, ponder__mode=mode, ponder__latent_steps=3, inference__threshold=0.2).eval()
    near, far = generated(model, far=False), generated(model, far=True)
    assert far[0] == near[0]
    assert far[0][-1][-1] == "cancelled"
    assert mode == "vanilla" or far[1] == near[1] > 0
    assert not far[2]._choosers  # all are forgotten


def test_logits_that_are_not_finite_fail_far_away_too():
    model = small_model(ponder__mode="vanilla").eval()
    with torch.no_grad():
        model.head.weight.fill_(float("nan"))
    for far in (False, True):
        assert {result[-1] for result in generated(model, far)[0]} == {"failed"}
