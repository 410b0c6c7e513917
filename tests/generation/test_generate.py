"""The Python function: batches, options, ranks and refusals."""

from dataclasses import replace

import pytest
import torch

from megatron_ponder.base.errors import UserError
from megatron_ponder.checkpoint.load import load_model
from megatron_ponder.checkpoint.writer import write_weights_checkpoint
from megatron_ponder.data.tokenizer import load_tokenizer
from megatron_ponder.generation.generate import generate
from megatron_ponder.generation.prefill import Prefill
from megatron_ponder.generation.request import Generation, Request
from megatron_ponder.generation.sampling import Sampling
from megatron_ponder.generation.sequences import Batching
from tests.distributed import run_distributed
from tests.models import random_tokens, small_config, small_model

TEXT_MODEL = {"model__vocab_size": 512, "inference__threshold": 0.2, "model__max_position_embeddings": 256}
TEXTS = ["import os\n", "def main(argv):\n    return", "", "naïve ☕", "class"]


def timeless(results: list[Generation]) -> list[Generation]:
    """The same without what a clock said."""
    return [replace(result, seconds_waited=0.0, seconds_to_first=0.0, seconds=0.0) for result in results]


@pytest.mark.parametrize("mode", ["adaptive", "fixed", "vanilla", "pause", "sps", "loop", "ponderlm"])
def test_batch_equals_one_at_a_time(mode):
    model = small_model(router_scale=3.0, ponder__mode=mode, ponder__latent_steps=3, inference__threshold=0.2)
    prompts = [random_tokens(1, length, seed=length)[0].tolist() for length in (1, 5, 9, 2)]
    together = generate(model, prompts, 12)
    for prompt, result in zip(prompts, together, strict=True):
        alone = generate(model, [prompt], 12)[0]
        assert (result.tokens, result.executed_steps) == (alone.tokens, alone.executed_steps)
        assert result.log_probabilities == pytest.approx(alone.log_probabilities, abs=1e-9)
        assert len(result.tokens) == 12
        kept = 0 if mode == "sps" else sum(result.executed_steps)
        assert result.cached_slots == len(result.executed_steps) + kept
    if mode == "adaptive":
        assert len({step for result in together for step in result.executed_steps}) > 2


def test_greedy_is_the_argmax_of_exact_evaluation():
    model = small_model(router_scale=3.0, inference__threshold=0.2)
    tokens = random_tokens(1, 4)
    result = generate(model, [tokens[0].tolist()], 6, top_log_probabilities=3)[0]
    for place, expected in enumerate(result.tokens):
        output = model.exact(tokens, model.rule("hard")).output_BLH[:, -1]
        log_p = model.head(output)[0].detach().log_softmax(-1)
        assert int(log_p.argmax()) == expected
        assert result.log_probabilities[place] == pytest.approx(float(log_p[expected]), abs=1e-9)
        top = log_p.topk(3)
        assert [token for token, _ in result.top_log_probabilities[place]] == top.indices.tolist()
        values = [value for _, value in result.top_log_probabilities[place]]
        assert values == pytest.approx(top.values.tolist(), abs=1e-9)
        tokens = torch.cat([tokens, torch.tensor([[expected]])], 1)


def test_stop_token_ends_its_sequence_alone():
    model = small_model()
    prompts = [[1, 2], [3, 4], [5]]
    free = generate(model, prompts, 8)
    stops = {free[1].tokens[2], free[2].tokens[5]}
    for before, after in zip(free, generate(model, prompts, 8, stop_ids=stops), strict=True):
        ends = [place for place, token in enumerate(before.tokens) if token in stops]
        assert after.tokens == before.tokens[: ends[0] + 1 if ends else 8]
        assert after.finish_reason == ("stop" if ends else "length")


def test_samples_draw_from_seeds_in_a_row():
    model = small_model()
    hot = Sampling(temperature=1.5, seed=3)
    three = generate(model, [[1, 2], [7]], 10, sampling=hot, samples=3)
    for place, (prompt, seed) in enumerate([([1, 2], 3), ([1, 2], 4), ([1, 2], 5), ([7], 3), ([7], 4), ([7], 5)]):
        alone = generate(model, [prompt], 10, sampling=replace(hot, seed=seed))[0]
        assert three[place].tokens == alone.tokens
    assert len({tuple(result.tokens) for result in three[:3]}) == 3


def test_requests_have_their_own_options():
    model = small_model()
    requests = [Request((1, 2), 3), Request((1, 2), 7, Sampling(temperature=1, seed=2)), [1, 2]]
    lengths = [len(result.tokens) for result in generate(model, requests, 5)]
    assert lengths == [3, 7, 5]


@pytest.mark.parametrize("many", [3, 50])
def test_more_prompts_than_rows(many):
    model = small_model()
    prompts = [[1 + index % 60, index % 7] for index in range(many)]
    seen = []
    results = generate(
        model, prompts, 4, batching=Batching(max_sequences=2), on_token=lambda index, result: seen.append(index)
    )
    assert [result.prompt for result in results] == prompts
    assert sorted(seen) == sorted(4 * list(range(many)))
    assert generate(model, prompts, 0, batching=Batching(max_sequences=1))[-1].finish_reason == "length"


@pytest.mark.parametrize("prefill", [None, Prefill(chunk=5, shortest=1), Prefill(tolerance=1e-12, shortest=1)])
def test_prompts_may_be_read_in_any_way(prefill):
    model = small_model(router_scale=3.0, inference__threshold=0.2)
    prompts = [random_tokens(1, length, seed=length)[0].tolist() for length in (1, 30, 50)]
    want = generate(model, prompts, 6)
    got = generate(model, prompts, 6, batching=Batching(prefill=prefill))
    assert [(result.tokens, result.executed_steps) for result in got] == [
        (result.tokens, result.executed_steps) for result in want
    ]


def test_refinements_approach_the_fixed_point():
    model = small_model(router_scale=3.0, inference__threshold=0.2)
    prompt = random_tokens(1, 40, seed=5)[0].tolist()

    def log_p(prefill):
        return generate(model, [prompt], 1, batching=Batching(prefill=prefill))[0].log_probabilities[0]

    exact = log_p(None)
    errors = [abs(log_p(Prefill(refinements=count, shortest=1)) - exact) for count in (0, 8, 120)]
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 1e-9


def test_positions_restart_after_a_document():
    model = small_model(eod_id=7)
    assert generate(model, [[3, 7, 5, 6]], 5)[0].tokens == generate(model, [[5, 6]], 5)[0].tokens


@pytest.mark.parametrize(
    ("family", "steps", "dtype"), [("llama", 1, "fp64"), ("gpt_neox", 3, "fp64"), ("llama", 2, "fp32")]
)
def test_documents_of_prompts_are_read_in_windows_of_their_own(family, steps, dtype):
    model = small_model(
        seed=steps,
        eod_id=7,
        router_scale=3.0,
        model__family=family,
        ponder__latent_steps=steps,
        inference__threshold=0.3,
    )
    model = model.float() if dtype == "fp32" else model
    prompts = [random_tokens(1, length, seed=length)[0].tolist() for length in (31, 18)]
    for place in (0, 9, 10, 17):
        prompts[0][place] = prompts[1][-1 - place] = 7
    want = generate(model, prompts, 4, batching=Batching(prefill=None))
    got = generate(model, prompts, 4, batching=Batching(prefill=Prefill(chunk=4, shortest=1)))
    for slots, windows in zip(want, got, strict=True):
        assert (windows.tokens, windows.executed_steps) == (slots.tokens, slots.executed_steps)
        tolerance = 1e-4 if dtype == "fp32" else 1e-9
        assert windows.log_probabilities == pytest.approx(slots.log_probabilities, abs=tolerance)


def test_texts_and_stop_strings(corpus):
    model, tokenizer = small_model(**TEXT_MODEL), load_tokenizer(corpus.tokenizer)
    free = generate(model, TEXTS, 20, tokenizer=tokenizer)
    for text, result in zip(TEXTS, free, strict=True):
        assert result.prompt == (tokenizer.encode(text) or [tokenizer.eod_id])
        assert tokenizer.decode(result.prompt + result.tokens).removesuffix(result.text) == tokenizer.decode(
            result.prompt
        )
    stop = free[0].text[5:8]
    stopped = generate(model, TEXTS, 20, tokenizer=tokenizer, stop_strings=[stop])
    for before, after in zip(free, stopped, strict=True):
        assert after.text == before.text.partition(stop)[0]
        assert after.tokens == before.tokens[: len(after.tokens)]
        assert after.finish_reason == ("stop" if stop in before.text else "length")


def test_refusals(corpus):
    model = small_model()
    for prompts, options, message in [
        ([[1], []], {}, "prompt 1: the prompt is empty; give at least one token"),
        ([[1] * 60], {"max_new_tokens": 5}, "prompt 0: the prompt has 60 tokens .* is meant for 64"),
        ([[1], ["a"] * 3], {"samples": 2, "max_new_tokens": 99}, "prompt 0: .*99 new ones"),
        ([[99]], {}, "token ids outside of 0 to 60"),
        (["text"], {}, "a text needs the model's tokenizer"),
        ([[1]], {"stop_strings": ["a"]}, "stop strings need a tokenizer"),
        ([[1]], {"stop_strings": [""]}, "a stop string is empty"),
        ([[1]], {"samples": 0}, "samples is 0; its range is 1 to"),
        ([[1]], {"stop_ids": [-1]}, "stop_tokens is -1; its range is 0 to"),
        ([[1]], {"max_new_tokens": -1}, "max_new_tokens is -1; its range is 0 to"),
    ]:
        with pytest.raises(UserError, match=message):
            generate(model, prompts, **{"max_new_tokens": 4} | options)


def generated_on(mesh, folder) -> list[Generation]:
    """What the function gives on this rank, of a model that is loaded in part."""
    loaded = load_model(folder, mesh, torch.float64)
    assert len(loaded.model.part.layers) <= -(-3 // mesh.pipeline.size)
    options = {"sampling": Sampling(temperature=0.9, seed=5), "samples": 2, "tokenizer": loaded.tokenizer}
    return timeless(generate(loaded.model, TEXTS, 8, mesh=mesh, **options))


@pytest.mark.parametrize(
    ("tensor", "pipeline", "copies"),
    [
        (2, 1, 1),
        pytest.param(1, 2, 1, marks=pytest.mark.slow),
        pytest.param(1, 1, 2, marks=pytest.mark.slow),
        pytest.param(1, 3, 1, marks=pytest.mark.slow),
        pytest.param(2, 1, 2, marks=pytest.mark.slow),
    ],
)
def test_all_ranks_get_the_results_of_one_process(corpus, tmp_path, tensor, pipeline, copies):
    overrides = TEXT_MODEL | {"model__num_layers": 3, "model__tie_embeddings": True}
    weights = {name: parameter.detach() for name, parameter in small_model(**overrides).named_parameters()}
    write_weights_checkpoint(tmp_path / "model", weights, small_config(**overrides), corpus.tokenizer)
    world_size = tensor * pipeline * copies
    of_ranks = run_distributed(generated_on, world_size, tmp_path / "model", tensor=tensor, pipeline=pipeline)
    loaded = load_model(tmp_path / "model", dtype=torch.float64)
    options = {"sampling": Sampling(temperature=0.9, seed=5), "samples": 2, "tokenizer": loaded.tokenizer}
    want = generate(loaded.model, TEXTS, 8, **options)
    for results in of_ranks:
        for got, one in zip(results, want, strict=True):
            assert (got.tokens, got.text, got.executed_steps) == (one.tokens, one.text, one.executed_steps)
            assert got.log_probabilities == pytest.approx(one.log_probabilities, abs=1e-9)
