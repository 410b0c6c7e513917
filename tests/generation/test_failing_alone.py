"""What goes wrong in one sequence ends it with words, and no other."""

import io
import json
import math

import pytest
import torch
from rich.console import Console

from megatron_ponder.base.errors import UserError
from megatron_ponder.data.tokenizer import Tokenizer, load_tokenizer
from megatron_ponder.generation.generate import generate
from megatron_ponder.generation.generator import Generator
from megatron_ponder.generation.interactive import converse
from megatron_ponder.generation.options import Options
from megatron_ponder.generation.predictions import predict
from megatron_ponder.generation.prefill import Prefill
from megatron_ponder.generation.request import Request
from megatron_ponder.generation.sampling import Chooser, Sampling, choose
from megatron_ponder.generation.sequences import Batching
from tests.models import random_tokens, small_model
from tests.serving.test_serving import Served, running

POISON = 60
READ = random_tokens(1, 40, vocab_size=POISON)[0].tolist()
PROMPTS = [READ[:3], [*READ[:20], POISON, *READ[20:]], READ, [7, POISON], READ[5:9]]
TEXT_MODEL = {"model__vocab_size": 600, "model__max_position_embeddings": 256, "inference__threshold": 0.3}
PIECES = 512


def poisoned(**overrides):
    """A model that gives no number after one token of its vocabulary."""
    model = small_model(router_scale=3.0, inference__threshold=0.2, model__max_position_embeddings=128, **overrides)
    with torch.no_grad():
        model.embedding.weight[POISON] = math.nan
    return model


def larger_vocabulary():
    """A model that likes best the ids for which its tokenizer has no piece."""
    model = small_model(**TEXT_MODEL).eval()
    with torch.no_grad():
        model.head.weight[PIECES:] *= 50
    return model


@pytest.mark.parametrize("mode", ["adaptive", "fixed", "vanilla", "pause", "loop"])
@pytest.mark.parametrize("shortest", [2, 1000], ids=["iterated", "slots"])
def test_logits_that_are_not_finite_end_their_sequence_alone(mode, shortest):
    """Also those of prompts that begin like one that has failed, which are kept for each other."""
    model = poisoned(ponder__mode=mode)
    batching = Batching(2, prefill=Prefill(shortest=shortest))
    sampling = Sampling(temperature=0.7, seed=3)
    results = generate(model, PROMPTS, 6, sampling=sampling, batching=batching)
    for prompt, result in zip(PROMPTS, results, strict=True):
        if POISON in prompt:
            assert (result.finish_reason, result.tokens) == ("failed", [])
            assert "logits are not finite" in result.error
        elif POISON not in result.tokens:
            alone = generate(model, [prompt], 6, sampling=sampling, batching=batching)[0]
            assert (result.finish_reason, result.error) == ("length", "")
            assert (result.tokens, result.executed_steps) == (alone.tokens, alone.executed_steps)
    assert sum(result.finish_reason == "length" for result in results) >= 2


def test_nothing_is_chosen_where_logits_are_not_finite():
    for value in (math.nan, math.inf, -math.inf):
        for rules in ({}, {"temperature": 1}, {"temperature": 1, "top_k": 3}):
            logits = torch.randn(3, 20, generator=torch.Generator().manual_seed(0))
            logits[1, 5] = value
            choosers = [Chooser(Sampling(**rules), [1]) for _ in logits]
            first, second, third = choose(logits, choosers)
            assert second is None
            assert 0 <= first < 20
            assert 0 <= third < 20
    wide = torch.tensor([[3e38, -3e38, 0.0]])  # each finite, and not their differences
    assert predict(wide, [Chooser(Sampling(), [])], [0]) == [None]


class Fragile:
    """A tokenizer that breaks on one token."""

    def __init__(self, tokenizer: Tokenizer, token: int) -> None:
        self._tokenizer, self._token = tokenizer, token

    def __getattr__(self, name: str):
        return getattr(self._tokenizer, name)

    def decode(self, ids: list[int]) -> str:
        if self._token in ids:
            raise IndexError("no such piece")
        return self._tokenizer.decode(ids)


def test_an_exception_in_one_text_ends_it_alone(corpus, capsys):
    model, tokenizer = small_model(**TEXT_MODEL), load_tokenizer(corpus.tokenizer)
    free = generate(model, [[5], [90, 17]], 8, tokenizer=tokenizer)
    token = next(token for token in free[0].tokens[1:] if token not in free[1].tokens)
    broken = generate(model, [[5], [90, 17]], 8, tokenizer=Fragile(tokenizer, token))
    assert (broken[0].finish_reason, broken[1].tokens) == ("failed", free[1].tokens)
    assert "no such piece" in broken[0].error
    assert "Traceback" in capsys.readouterr().err


def test_ids_without_a_piece_are_neither_chosen_nor_read(corpus):
    model, tokenizer = larger_vocabulary(), load_tokenizer(corpus.tokenizer)
    assert tokenizer.vocab_size == PIECES
    assert max(generate(model, [[5]], 20)[0].tokens) >= PIECES  # what the model would say without a tokenizer
    for sampling in (Sampling(), Sampling(temperature=1, seed=1), Sampling(1.3, 1.0, 5, seed=2)):
        result = generate(model, ["import"], 20, sampling=sampling, tokenizer=tokenizer, top_log_probabilities=5)[0]
        assert max(result.tokens) < PIECES
        assert max(token for top in result.top_log_probabilities for token, _ in top) < PIECES
    result = generate(model, [[5]], 1, tokenizer=tokenizer, top_log_probabilities=PIECES)[0]
    assert sum(math.exp(value) for _, value in result.top_log_probabilities[0]) == pytest.approx(1)
    with pytest.raises(UserError, match="token ids outside of 0 to 511; use the model's tokenizer"):
        generate(model, [[5, PIECES]], 4, tokenizer=tokenizer)


def test_a_server_goes_on_when_requests_fail(corpus):
    model = larger_vocabulary()
    with torch.no_grad():
        model.embedding.weight[POISON] = math.nan
    served = Served(model, load_tokenizer(corpus.tokenizer))
    good = {"prompt": [5, 90], "max_tokens": 6, "temperature": 0, "logprobs": 5, "echo": False}
    with running(served) as server:
        status, want = server.client.post(good)
        assert status == 200
        for body in (
            {"prompt": [5, POISON]},
            {"prompt": [[5], [POISON]], "n": 2},
            {"prompt": [POISON], "max_tokens": 1},
        ):
            status, answer = server.client.post(body)
            error = answer["error"]
            assert (status, error["code"], error["type"]) == (500, "generation_failed", "server_error")
            assert "logits are not finite" in error["message"]
        assert server.client.post({"prompt": [5, POISON], "stream": True})[0] == 500  # nothing was sent yet
        for body in ({"prompt": [5, PIECES]}, {"repetition_penalty": 1e-40}, {"prompt": [10**400]}, {"top_k": 10**400}):
            assert server.client.post(body)[0] == 400
        again = server.client.post(good)[1]["choices"]
        assert again == want["choices"]
        assert server.client.get("/health")[0] == 200
        assert server.client.metric('ponder_sequences_total{finish_reason="failed"}') > 0


def test_a_stream_that_fails_ends_with_the_error(served_overflowing):
    served, prompt = served_overflowing
    with running(served) as server:
        connection = server.client.open({"prompt": prompt, "temperature": 0, "max_tokens": 50, "stream": True})
        response = connection.getresponse()
        assert response.status == 200
        *events, last, rest = response.read().decode().split("\n\n")
        connection.close()
        assert rest == ""
        assert "".join(json.loads(event[6:])["choices"][0]["text"] for event in events)
        assert json.loads(last[6:])["error"]["code"] == "generation_failed"
        assert server.client.post({"prompt": [9], "max_tokens": 1})[0] == 200


@pytest.fixture
def served_overflowing(corpus) -> tuple[Served, list[int]]:
    """A model that breaks after some tokens of its own, and its prompt."""
    model, tokenizer = small_model(**TEXT_MODEL).eval(), load_tokenizer(corpus.tokenizer)
    prompt = tokenizer.encode("import os\n")
    tokens = generate(model, [prompt], 30, tokenizer=tokenizer)[0].tokens
    at = next(at for at in range(8, 30) if tokens[at] not in [*prompt, 9, *tokens[:at]])
    with torch.no_grad():
        model.embedding.weight[tokens[at]] = math.nan
    return Served(model, tokenizer), prompt


def test_requests_that_cannot_be_begun_end_no_server(served_overflowing, monkeypatch, capsys):
    served, _ = served_overflowing
    check = Generator.check

    def breaking(generator: Generator, request: Request) -> None:
        if request.prompt == (9, 9):
            raise ZeroDivisionError("a bug")
        check(generator, request)

    monkeypatch.setattr(Generator, "check", breaking)
    with running(served) as server:
        status, answer = server.client.post({"prompt": [9, 9]})
        assert (status, answer["error"]["code"]) == (500, "generation_failed")
        assert server.client.post({"prompt": [9], "max_tokens": 1})[0] == 200
    assert "ZeroDivisionError: a bug" in capsys.readouterr().err


def test_a_conversation_goes_on(served_overflowing):
    served, prompt = served_overflowing
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, color_system=None, soft_wrap=True, highlight=False)
    lines = iter([served.tokenizer.decode(prompt), "class"])

    def ask() -> str:
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    with Generator(served.model, tokenizer=served.tokenizer) as generator:
        converse(generator, Options(max_new_tokens=40), served.tokenizer, console, ask)
    assert out.getvalue().count("failed: the model's logits are not finite") == 1
    assert out.getvalue().count(" tokens in ") == 2
