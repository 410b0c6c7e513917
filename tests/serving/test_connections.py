"""Connections on which little comes, or nothing; too many of them; and how soon an answer is there."""

import http.client
import json
import socket
import statistics
import time
from contextlib import ExitStack, closing, suppress

import pytest

from megatron_ponder.base.errors import UserError
from megatron_ponder.serving import connections
from megatron_ponder.serving.connections import ConnectionLimits
from tests.serving.test_serving import Running, running, served

__all__ = ["served"]  # a fixture

HALF = b"GET /health HTTP/1.1\r\nHost: a\r\nX-Slow: "


def opened(server: Running, content: bytes = b"") -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", server.client.port), timeout=20)
    connection.sendall(content)
    return connection


def received(connection: socket.socket) -> bytes:
    """All until the server closes."""
    with connection:
        return b"".join(iter(lambda: connection.recv(1 << 16), b""))


def error_of(answer: bytes) -> dict:
    return json.loads(answer.partition(b"\r\n\r\n")[2])["error"]


def test_clients_that_are_slow_with_the_head_of_a_request(served):
    with running(served, connections=ConnectionLimits(idle_timeout=0.4)) as server:
        begun = time.monotonic()
        silent, half, second = opened(server), opened(server, HALF), opened(server, HALF + b"\r\n\r\n" + HALF)
        trickling = opened(server, HALF)
        for _ in range(3):  # which does not buy it time
            time.sleep(0.1)
            trickling.sendall(b"x")
        assert received(silent) == b""
        for connection in (half, trickling):
            answer = received(connection)
            assert answer.startswith(b"HTTP/1.1 408 ")
            assert error_of(answer)["code"] == "timeout"
        assert received(second).startswith(b"HTTP/1.1 200 ")  # and what was half sent after it is let go
        assert 0.3 < time.monotonic() - begun < 5
        body = opened(server, b"POST /health HTTP/1.1\r\nHost: a\r\nContent-Length: 1000000\r\n\r\nx")
        assert received(body).startswith(b"HTTP/1.1 405 ")  # answered; the rest of the body is not waited for


def test_a_slow_answer_is_waited_for(served):
    """The time of a client does not run while the server works."""
    with running(served, connections=ConnectionLimits(idle_timeout=0.3)) as server:
        step = server.generator.step
        server.generator.step = lambda: time.sleep(0.05) or step()
        begun = time.monotonic()
        assert server.client.post({"prompt": "a", "max_tokens": 12, "ignore_eos": True})[0] == 200
        assert time.monotonic() - begun > 0.5


def test_too_many_connections(served, monkeypatch):
    monkeypatch.setattr(connections, "SPARE", 2)
    with (
        running(served, connections=ConnectionLimits(max_connections=5, idle_timeout=1.5)) as server,
        ExitStack() as stack,
    ):
        held = [stack.enter_context(opened(server)) for _ in range(5)]
        time.sleep(0.1)
        status, answer = server.client.post({"prompt": "a"})
        assert (status, answer["error"]["code"]) == (503, "too_many_connections")
        assert "5 connections are open already; try again later" in answer["error"]["message"]
        assert server.client.get("/health")[0] == 200
        for _ in range(2):
            held.append(stack.enter_context(opened(server)))
        begun = time.monotonic()
        with suppress(ConnectionResetError):
            assert received(opened(server)) == b""
        assert time.monotonic() - begun < 1
        time.sleep(2.0)  # in which those that say nothing are let go
        assert server.client.post({"prompt": "a", "max_tokens": 1})[0] == 200


def test_what_is_no_http_is_refused_as_all_else_is(served):
    with running(served) as server:
        for content in (
            b"\x16\x03\x01\x02\x00\r\n\r\n",
            b"GET /\r\n\r\n",
            b"GET / HTTP/1.1\r\nHost: a\r\nX: " + b"x" * 100_000,
        ):
            answer = received(opened(server, content))
            assert answer.startswith(b"HTTP/1.1 400 ")
            assert error_of(answer)["type"] == "invalid_request_error"


def test_an_answer_is_there_at_once_on_a_connection_that_is_kept(served):
    """Without TCP_NODELAY its second half waits 40 ms for the first to be acknowledged."""
    with running(served) as server, closing(http.client.HTTPConnection("127.0.0.1", server.client.port)) as client:
        seconds = []
        for _ in range(12):
            begun = time.perf_counter()
            client.request("GET", "/health")
            client.getresponse().read()
            seconds.append(time.perf_counter() - begun)
        assert statistics.median(seconds) < 0.03


def test_limits(monkeypatch):
    for options in ({"max_connections": 0}, {"idle_timeout": 0}, {"idle_timeout": float("nan")}, {"idle_timeout": 1e9}):
        with pytest.raises(UserError):
            ConnectionLimits(**options)
    allowed = []
    monkeypatch.setattr(connections.resource, "getrlimit", lambda _: (256, 4096))
    monkeypatch.setattr(connections.resource, "setrlimit", lambda _, limits: allowed.append(limits))
    ConnectionLimits(max_connections=1000).reserve_files()
    ConnectionLimits(max_connections=20).reserve_files()
    assert allowed == [(1192, 4096)]
    with pytest.raises(UserError, match=r"the system allows 4096 \(ulimit -Hn\); allow more, or 3904 connections"):
        ConnectionLimits(max_connections=100_000).reserve_files()
