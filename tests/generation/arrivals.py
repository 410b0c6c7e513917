"""Prompts that arrive one after another, on any ranks, beside the definition of the model."""

from functools import cache

import torch

from megatron_ponder.checkpoint.load import even_part, load_weights
from megatron_ponder.generation.generator import Generator
from megatron_ponder.generation.prefill import Prefill
from megatron_ponder.generation.request import Request
from megatron_ponder.generation.sequences import Batching
from megatron_ponder.model.exits import Exit
from megatron_ponder.model.ponder import PonderLM
from megatron_ponder.model.router import Rule
from tests.generation.sequential import continue_greedily
from tests.models import LEARNED, random_tokens, small_model

LENGTHS = (1, 5, 40, 2, 33, 9, 70, 3, 17, 1)
NEW = 8
MODELS = {
    f"{family}-{mode}": {"model__family": family, "ponder__mode": mode}
    for family in ("llama", "gpt_neox")
    for mode in ("adaptive", "fixed", "vanilla")
} | {
    "llama-fixed": {"ponder__mode": "fixed", "ponder__latent_scale": 0.3},
    "gpt_neox-adaptive": {"model__family": "gpt_neox"} | LEARNED,
    "llama-pause": {"ponder__mode": "pause"},
    "llama-sps": {"ponder__mode": "sps"},
    "gpt_neox-own": {"model__family": "gpt_neox", "ponder__latent_visibility": "own"},
    "gpt_neox-loop": {"model__family": "gpt_neox", "ponder__mode": "loop"},
    "llama-exit": {"ponder__mode": "fixed"},
    "llama-ponderlm": {"ponder__mode": "ponderlm", "model__vocab_size": 301, "model__tie_embeddings": True},
}

# Of weights with which tokens take all numbers of steps, where those of 0 do not have it so.
SEEDS = {"gpt_neox-adaptive": 2}


EXITS = {"llama-exit": Exit("entropy", 3.4)}


def arrivals_model(name: str):
    """A model whose tokens take all numbers of steps."""
    model = small_model(
        SEEDS.get(name, 0),
        router_scale=3.0,
        ponder__latent_steps=3,
        inference__threshold=0.2,
        model__num_layers=3,
        model__max_position_embeddings=256,
        **MODELS[name],
    ).eval()
    if name in EXITS:  # by predictions that differ
        with torch.no_grad():
            model.head.weight *= 12
    return model


def rule_of_arrivals(name: str, model: PonderLM) -> Rule:
    """By which its tokens stop."""
    return model.rule("hard", exit=EXITS.get(name))


def prompts() -> list[list[int]]:
    """Ten of different lengths."""
    return [random_tokens(1, length, seed=length + index)[0].tolist() for index, length in enumerate(LENGTHS)]


@cache
def expected(name: str) -> list[tuple[list[int], list[float], list[int]]]:
    """Tokens, log-probabilities and K̂ of each, one at a time, which takes seconds."""
    model = arrivals_model(name)
    return [continue_greedily(model, rule_of_arrivals(name, model), prompt, NEW) for prompt in prompts()]


def generated(mesh, name: str, dtype: torch.dtype, sequential: bool) -> tuple[list, int] | None:
    """The same of ten prompts of which one arrives with every third forward; None on ranks that follow.

    With it, the slots that caches still hold.
    """
    whole = arrivals_model(name)
    model = whole
    if mesh.model.size > 1:
        part = even_part(whole.model_config.num_layers, mesh.pipeline)
        model = (
            PonderLM(whole.model_config, whole.ponder_config, mesh, part=part, inference=whole.inference)
            .double()
            .eval()
        )
        load_weights(model, whole.state_dict())
    batching = Batching(max_sequences=6, prefill=None if sequential else Prefill(chunk=32, shortest=8))
    with Generator(model.to(dtype), mesh, rule_of_arrivals(name, model), batching) as generator:
        if generator.drives:
            generator.keep_alive()
            sequences = []
            for prompt in prompts():
                sequences.append(generator.submit(Request(tuple(prompt), NEW)))
                for _ in range(3):
                    generator.step()
            generator.run()
            generator.keep_alive()
    if not generator.drives:
        return None
    results = [sequence.generation for sequence in sequences]
    held = sum(runner.cache.reserved for runner in generator._runners)
    return [(result.tokens, result.log_probabilities, result.executed_steps) for result in results], held
