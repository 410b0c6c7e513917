"""Clients that leave, wait too long or are too many; servers that stop or break."""

import http.client
import json
import socket
import threading
import time
from contextlib import closing

import pytest

from megatron_ponder.base.errors import UserError
from megatron_ponder.serving.application import Limits
from megatron_ponder.serving.serving import Address, listen, url
from tests.serving.test_serving import Client, Running, running, served

__all__ = ["served"]  # a fixture

LONG = {"prompt": "def f(x):", "max_tokens": 200, "ignore_eos": True, "seed": 1}
SHORT = {"prompt": "import", "max_tokens": 3, "seed": 1}


def cancelled(server: Running) -> float:
    return server.client.metric('ponder_sequences_total{finish_reason="cancelled"}')


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("slots", [1 << 17, 640])
def test_clients_that_leave_are_freed_at_once(served, stream, slots):
    """One runs, three run beside it, and two wait: all leave. In the small cache some have gone back to waiting."""
    gate = threading.Event()
    with running(served, slots=slots, gate=gate) as server:
        step = server.generator.step
        # Long enough that on a busy machine, too, none is finished before all have left.
        server.generator.step = lambda: time.sleep(0.01) or step()
        connections = [server.client.open(LONG | {"stream": stream, "n": n}) for n in (1, 3, 2)]
        server.wait(lambda: server.worker._accepted == 6)
        gate.set()
        server.wait(lambda: server.worker.snapshot.usage.tokens > 8)
        assert (server.worker.snapshot.live, server.worker.snapshot.waiting) == (4, 2)
        if slots == 640:
            server.wait(lambda: server.worker.snapshot.usage.preempted > 0)
        if stream:  # in the middle of its answer
            assert connections[0].getresponse().read1(100).startswith(b'data: {"id"')
        for connection in connections:
            connection.sock.shutdown(socket.SHUT_RDWR)
            connection.close()
        server.wait(lambda: server.at_rest)
        assert server.worker.snapshot.usage.tokens < 6 * 200
        server.wait(lambda: cancelled(server) == 6)  # it is counted after the generator is at rest
        if not stream:  # a stream that has begun has its status already
            server.wait(lambda: server.client.metric('ponder_requests_total{path="/v1/completions",status="499"}') == 3)
        assert server.client.post(SHORT)[0] == 200


def test_a_client_that_leaves_within_its_body(served):
    with running(served) as server:
        with socket.create_connection(("127.0.0.1", server.client.port)) as connection:
            connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 100\r\n\r\n{")
        assert server.client.post(SHORT)[0] == 200


def test_time_out(served):
    """504 where nothing was sent; a stream ends with what there is."""
    # Seconds in which a busy machine writes a token, and steps so slow that it cannot write all.
    with running(served, Limits(timeout=3.0)) as server:
        step = server.generator.step
        server.generator.step = lambda: time.sleep(0.03) or step()
        status, answer = server.client.post(LONG)
        assert (status, answer["error"]["code"]) == (504, "timeout")
        assert "more than 3 s" in answer["error"]["message"]
        chunks = server.client.stream(LONG | {"stream_options": {"include_usage": True}})
        assert chunks[-2]["choices"][0]["finish_reason"] == "cancelled"
        assert 0 < chunks[-1]["usage"]["completion_tokens"] < 200
        server.wait(lambda: server.at_rest)
        server.wait(lambda: cancelled(server) == 2)  # it is counted after the generator is at rest


def test_time_out_of_a_body(served):
    with (
        running(served, Limits(timeout=0.3)) as server,
        socket.create_connection(("127.0.0.1", server.client.port)) as connection,
    ):
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 100\r\n\r\n{")
        assert connection.recv(100).startswith(b"HTTP/1.1 408 ")


def test_time_out_while_waiting(served):
    gate = threading.Event()
    with running(served, Limits(timeout=0.3), gate=gate) as server:
        for stream in (False, True):
            status, answer = server.client.post(SHORT | {"stream": stream})
            assert (status, answer["error"]["code"]) == (504, "timeout")


def test_queue_limit(served):
    gate = threading.Event()
    with running(served, waiting=2, gate=gate) as server:
        connection = server.client.open(SHORT | {"n": 5})
        server.wait(lambda: server.worker._accepted == 5)
        second = server.client.open(SHORT | {"n": 2})
        response = second.getresponse()
        assert (response.status, response.headers["retry-after"]) == (429, "1")
        assert json.loads(response.read())["error"]["code"] == "queue_full"
        second.close()
        status, answer = server.client.post(SHORT | {"n": 7})
        assert status == 400
        assert "ask for 6 at most" in answer["error"]["message"]
        gate.set()
        with closing(connection):
            assert connection.getresponse().status == 200
        assert server.client.post(SHORT | {"n": 6})[0] == 200


def test_api_key(served):
    with pytest.raises(UserError, match="API key is empty; give one"):
        Limits(api_key=" ")
    with pytest.raises(UserError, match="the API key has other characters"):
        Limits(api_key="schlüssel")
    with pytest.raises(UserError, match="the API key begins or ends with a space, which no header keeps"):
        Limits(api_key="secret ")
    with running(served) as server:
        assert server.client.get("/v1/models")[0] == 200
    with running(served, Limits(api_key="secret")) as server:
        for scheme in ("bearer", "BEARER", "Bearer "):
            assert Client(server.client.port, Authorization=f"{scheme} secret").post(SHORT)[0] == 200
        for headers in (
            {},
            {"Authorization": "Bearer wrong"},
            {"Authorization": "secret"},
            {"Authorization": "Basic secret"},
        ):
            client = Client(server.client.port, **headers)
            status, answer = client.post(SHORT)
            assert (status, answer["error"]["code"]) == (401, "invalid_api_key")
            assert client.get("/metrics")[0] == client.get("/v1/models")[0] == 401
            assert client.get("/health")[0] == 200
        assert server.client.post(SHORT)[0] == 200
        assert server.client.metric('ponder_requests_total{path="/v1/completions",status="401"}') == 4


def test_body_limit(served):
    with running(served, Limits(max_body_bytes=1000)) as server:
        for size in (2_000, 200_000):
            status, answer = server.client.post(SHORT | {"user": "x" * size})
            assert (status, answer["error"]["code"]) == (413, "too_large")
        with closing(http.client.HTTPConnection("127.0.0.1", server.client.port, timeout=10)) as connection:
            parts = iter([b"x" * 600, b"x" * 600])
            connection.request(
                "POST", "/v1/completions", parts, encode_chunked=True, headers={"Transfer-Encoding": "chunked"}
            )
            assert connection.getresponse().status == 413
        assert server.client.post(SHORT | {"user": "x" * 800})[0] == 200


def test_the_generator_fails(served):
    """Whoever waits gets 500, in a stream as an event; others 503; and the thread ends with the error."""
    gate = threading.Event()
    with running(served, gate=gate) as server:
        streaming = server.client.open(LONG | {"stream": True, "max_tokens": 240})
        waiting = [server.client.open(LONG | {"n": 4}) for _ in range(2)]
        server.wait(lambda: server.worker._accepted == 9)
        gate.set()
        response = streaming.getresponse()
        assert response.status == 200
        assert b'"text"' in response.readline()

        def broken() -> None:
            raise RuntimeError("broken")

        server.generator.step = broken
        assert json.loads(response.read().split(b"data: ")[-1])["error"]["code"] == "engine_failed"
        statuses = set()
        for connection in waiting:
            answer = connection.getresponse()
            statuses.add(answer.status)
            connection.close()
        streaming.close()
        assert 500 in statuses
        assert server.client.get("/health") == (503, '{"status":"failed"}')
        assert server.client.post(SHORT)[0] == 503
        server.wait(lambda: server.failure is not None)
        assert str(server.failure) == "broken"


def test_the_generator_hangs(served):
    """Who runs and who waits hears of it at once, though the thread that owns the generator is stuck."""
    gate = threading.Event()
    with running(served, gate=gate) as server:
        streaming = server.client.open(LONG | {"stream": True})
        server.wait(lambda: server.worker._jobs)
        waiting = server.client.open(SHORT)
        server.wait(lambda: server.worker._accepted == 2)
        server.worker.give_up()
        for connection in (streaming, waiting):
            with closing(connection):
                response = connection.getresponse()
                assert response.status == 500
                assert json.loads(response.read())["error"]["code"] == "engine_failed"
        assert server.client.get("/health") == (503, '{"status":"failed"}')

        def broken() -> None:
            raise RuntimeError("broken")

        server.generator.step = broken
        gate.set()
        server.wait(lambda: server.failure is not None)


def test_who_has_an_answer_gets_it_though_the_generator_fails(served):
    with running(served) as server:
        step = server.generator.step

        def last() -> None:
            step()
            if server.generator.usage.tokens == 3:
                raise RuntimeError("broken")

        server.generator.step = last
        assert server.client.post(SHORT)[0] == 200
        server.wait(lambda: server.failure is not None)


def test_stopping_lets_requests_finish_and_takes_no_more(served):
    gate = threading.Event()
    with running(served, gate=gate) as server:
        connections = [server.client.open(SHORT), server.client.open(SHORT | {"stream": True})]
        server.wait(lambda: server.worker._accepted == 2)
        server.worker.stop(60)
        gate.set()
        for connection in connections:
            with closing(connection):
                assert connection.getresponse().status == 200
        server.wait(lambda: server.worker.state == "stopped")
        assert server.client.post(SHORT)[0] == 503
        assert server.client.get("/health") == (503, '{"status":"stopped"}')


def test_after_the_grace_period_the_rest_is_cancelled(served):
    gate = threading.Event()
    with running(served, gate=gate) as server:
        connection = server.client.open(LONG)
        server.wait(lambda: server.worker._accepted == 1)
        server.worker.stop(0)
        gate.set()
        with closing(connection):
            assert connection.getresponse().status == 503
        server.wait(lambda: cancelled(server) == 1)  # it is counted after the generator is at rest


def test_addresses():
    with listen(Address(port=0)) as first:
        port = first.getsockname()[1]
        assert url(first) == f"http://127.0.0.1:{port}"
        with pytest.raises(UserError, match=f"127.0.0.1 port {port}: address already in use; choose another --port"):
            listen(Address(port=port))
    with pytest.raises(UserError, match="port is 70,000; its range is 0 to 65,535"):
        Address(port=70000)
    with pytest.raises(UserError, match="choose another --port or --host"):
        listen(Address(host="256.1.1.1"))
