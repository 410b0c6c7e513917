"""Many requests of all kinds at once."""

import random
import re
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.serving.test_serving import LONGEST, check_equal, expected, joined, running, served

__all__ = ["served"]  # a fixture

BAD = [
    {"prompt": []},
    {"prompt": [[]]},
    {"prompt": [5, "a"]},
    {"prompt": [512]},
    {"prompt": [-1]},
    {"prompt": [10**30]},
    {"prompt": "a", "temperature": -1},
    {"prompt": "a", "temperature": float("nan")},
    {"prompt": "a", "top_p": 0},
    {"prompt": "a", "max_tokens": -3},
    {"prompt": "a", "max_tokens": "many"},
    {"prompt": "a", "n": 0},
    {"prompt": "a", "n": 129},
    {"prompt": "a", "stop": [""]},
    {"prompt": "a", "stop": list("abcde")},
    {"prompt": "a", "logprobs": 6},
    {"prompt": "a", "logit_bias": {"5": 1}},
    {"prompt": "a", "seed": 1.5},
    {"prompt": "a", "model": "other"},
    {"prompt": "a", "stop_token_ids": [-1]},
    {"prompt": "a", "tempereture": 1},
    {"prompt": "a", "max_tokens": LONGEST},
    {"prompt": "a" * 3000},
    {"prompt": [[5] * 10, [5] * (LONGEST - 3)], "max_tokens": 4},
    b"{",
    b"\xff",
    b"[]",
    b"",
]


@pytest.mark.parametrize("of_each", [20, pytest.param(50, marks=pytest.mark.slow)])
def test_requests_of_all_kinds_at_once(served, of_each):
    """Valid ones are answered right, others get a 4xx, cancelled ones leave, and no slot is lost."""
    rng = random.Random(0)
    words = ["import os", "def f(x):\n", "class A", "", "return", "☕ naïve", "for i in range(10):\n    print(i)\n" * 3]

    def valid() -> dict:
        prompt = rng.choice(words)
        body = {
            "prompt": rng.choice([prompt, served.tokenizer.encode(prompt) or [9], [prompt, rng.choice(words)]]),
            "max_tokens": rng.randrange(12),
            "temperature": rng.choice([0, 0.7, 1.0]),
            "seed": rng.randrange(1000),
        }
        optional = {"n": 2, "logprobs": 1, "top_p": 0.8, "top_k": 9, "min_p": 0.1, "stop": "e"}
        return body | {key: value for key, value in optional.items() if rng.random() < 0.3}

    possible = [valid() for _ in range(24)]
    kinds = ["valid", "streamed", "cancelled", "bad"] * of_each
    rng.shuffle(kinds)
    orders = []
    for kind in kinds:
        long = {"prompt": rng.choice(words), "max_tokens": 150, "stream": rng.random() < 0.5, "ignore_eos": True}
        body = {"cancelled": long, "bad": rng.choice(BAD)}.get(kind, rng.choice(possible))
        orders.append((kind, body, rng.uniform(0, 0.2)))

    with running(served, waiting=400, slots=2000) as server:

        def ask(order):
            kind, body, delay = order
            if kind == "cancelled":
                connection = server.client.open(body)
                time.sleep(delay)
                connection.close()
                return None
            if kind == "streamed":
                return joined(server.client.stream(body | {"stream_options": {"include_usage": True}}))
            return server.client.post(body)

        with ThreadPoolExecutor(24) as pool:
            answers = list(pool.map(ask, orders))
        server.wait(lambda: server.at_rest)
        cancelled = server.client.metric('ponder_sequences_total{finish_reason="cancelled"}')
        statuses = re.findall(
            r'ponder_requests_total\{path="/v1/completions",status="(\d+)"\}', server.client.get("/metrics")[1]
        )
        assert "500" not in statuses
        assert server.client.metric("ponder_cached_slots") == 0
        usage = server.generator.usage
        assert usage.slots > usage.rows + 20 * of_each  # prompts were iterated too
    assert cancelled > 0.4 * of_each
    wanted = {id(body): expected(served, body) for body in possible}
    for (kind, body, _), answer in zip(orders, answers, strict=True):
        if kind == "valid":
            assert answer[0] == 200
            check_equal(wanted[id(body)], body, answer[1])
        elif kind == "streamed":
            check_equal(wanted[id(body)], body, answer)
        elif kind == "bad":
            status, content = answer
            assert 400 <= status < 500
            assert content["error"]["message"]
            assert "\n" not in content["error"]["message"]
