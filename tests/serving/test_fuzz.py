"""Requests that nobody would send on purpose: each has a well-formed answer, and the server goes on."""

import http.client
import json
import math
import os
import random
import secrets
import socket
from collections.abc import Callable
from typing import Any

import pytest

from megatron_ponder.serving.application import Limits
from tests.serving.test_serving import LONGEST, running, served

__all__ = ["served"]  # a fixture

GOOD = {"prompt": "import os\n", "max_tokens": 8, "temperature": 0}
PARAMETERS = [
    "model", "prompt", "max_tokens", "temperature", "top_p", "n", "best_of", "stream", "stream_options", "logprobs",
    "echo", "stop", "seed", "presence_penalty", "frequency_penalty", "logit_bias", "suffix", "user", "top_k", "min_p",
    "repetition_penalty", "stop_token_ids", "ignore_eos", "max_completion_tokens", "",
]  # fmt: skip
NUMBERS = [
    0, -1, 1, 2, 5, 128, 129, LONGEST, 2**31, 2**63 - 1, 2**63, -(2**63), 10**400, 0.0, -0.0, 1e-320, 1e-40, 1e-6, 0.5,
    1.0, 2.0, 1e38, 1e308, math.inf, -math.inf, math.nan,
]  # fmt: skip
TEXTS = [
    "", "import os", "small", "other", "\0", "\ud800", "\udc00\ud800", "☕ naïve", "\ufeff", "\n" * 99, "a" * 400,
    "</s>", "<0x0A>", "𝕒" * 20, "\u202e", "1", "true",
]  # fmt: skip
PATHS = [
    "/v1/completions/", "/v1/chat/completions", "/v1/models", "/v1/models/%ff%00", "/", "/health", "/metrics",
]  # fmt: skip
TYPES = ["application/json", "text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "", "ÿ"]


def value(rng: random.Random, depth: int = 0) -> Any:
    """Anything that JSON has, and numbers and texts that it should not have."""
    kind = rng.randrange(8 if depth < 3 else 5)
    if kind == 5:
        return [value(rng, depth + 1) for _ in range(rng.randrange(4))]
    if kind == 6:
        return {rng.choice(TEXTS): value(rng, depth + 1) for _ in range(rng.randrange(3))}
    if kind == 7:
        return [rng.randrange(-2, 520) for _ in range(rng.randrange(12))]
    return rng.choice([NUMBERS, NUMBERS, TEXTS, TEXTS, [None, True, False]][kind])


def body(rng: random.Random) -> bytes:
    """A good body with some of its parameters replaced, at times nested, cut off, or no JSON at all."""
    content = {"max_tokens": 3} | {name: value(rng) for name in rng.sample(PARAMETERS, rng.randrange(4))}
    written = json.dumps(content if rng.random() < 0.9 else value(rng)).encode()
    damage = rng.randrange(12)
    if damage == 0:
        return written[: rng.randrange(len(written) + 1)]
    if damage == 1:
        at = rng.randrange(len(written) + 1)
        return written[:at] + rng.randbytes(rng.randrange(1, 4)) + written[at:]
    if damage == 2:
        depth = rng.choice([10, 200, 5000, 100_000])
        return b'{"prompt":' + depth * rng.choice([b"[", b'{"a":']) + b"1"
    if damage == 3:
        return rng.randbytes(rng.randrange(40))
    return written


def ask(rng: random.Random, port: int) -> tuple[int, bytes]:
    """Send one request; its status and what it was answered."""
    method = "POST" if rng.random() < 0.9 else rng.choice(["GET", "PUT", "DELETE", "HEAD", "BREW"])
    path = "/v1/completions" if rng.random() < 0.8 else rng.choice(PATHS)
    headers = {"Content-Type": rng.choice(TYPES)} if rng.random() < 0.5 else {}
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        connection.request(method, path, body(rng), headers)
        response = connection.getresponse()
        return response.status, b"" if method == "HEAD" else response.read()
    finally:
        connection.close()


def send_in_part(rng: random.Random, port: int) -> None:
    """Begin a request, and leave."""
    content = body(rng)
    head = f"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: {len(content) + 1}\r\n\r\n".encode()
    whole = head + content
    with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
        connection.sendall(whole[: rng.randrange(1, len(whole) + 1)])


def check(status: int, content: bytes) -> None:
    """An answer is well-formed, whatever was asked."""
    assert 200 <= status < 300 or 400 <= status < 500, content
    if status >= 400:
        if content:  # not for HEAD
            error = json.loads(content)["error"]
            assert error.keys() == {"message", "type", "param", "code"}
            assert error["type"] == "invalid_request_error"
            assert error["message"]
            assert len(error["message"]) < 2000
    elif content.startswith(b"data: "):
        *events, done, rest = content.decode().split("\n\n")
        assert (done, rest) == ("data: [DONE]", "")
        assert all("choices" in json.loads(event.removeprefix("data: ")) for event in events)
    elif content.startswith(b"{"):
        json.loads(content, parse_constant=_refuse)


def _refuse(constant: str) -> None:
    raise AssertionError(f"{constant} is not JSON")


def storm(served, tries: int, seed: int, report: Callable[[str], None] = print) -> None:
    """Ask so many times; afterwards, and now and then, a good request gets the right text."""
    report(f"seed {seed}: set PONDER_FUZZ_SEED to it to have the same requests again")
    with running(served, Limits(timeout=30, max_body_bytes=1 << 18), waiting=600) as server:
        status, right = server.client.post(GOOD)
        assert status == 200
        for index in range(tries):
            rng = random.Random(f"{seed} {index}")
            if rng.random() < 0.1:
                send_in_part(rng, server.client.port)
                continue
            status, content = ask(rng, server.client.port)
            try:
                check(status, content)
            except Exception as error:
                raise AssertionError(f"request {index} of seed {seed}: {status} {content[:300]}") from error
            if index % 100 == 0:
                assert server.client.post(GOOD)[1]["choices"] == right["choices"]
        assert server.failure is None
        assert server.client.post(GOOD)[1]["choices"] == right["choices"]
        server.wait(lambda: server.at_rest)


def test_a_few_odd_requests(served):
    storm(served, 300, int(os.environ.get("PONDER_FUZZ_SEED", "0")))


@pytest.mark.slow
def test_many_odd_requests(served):
    storm(served, 10_000, int(os.environ.get("PONDER_FUZZ_SEED") or secrets.randbelow(1 << 32)))
