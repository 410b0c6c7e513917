import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import openai
import pytest

from megatron_ponder.base.errors import EXIT_HUNG
from megatron_ponder.checkpoint.load import load_model
from megatron_ponder.checkpoint.writer import write_weights_checkpoint
from megatron_ponder.commands.ponder import start
from megatron_ponder.generation import loading
from megatron_ponder.generation.generate import generate
from megatron_ponder.generation.generator import Generator
from tests.models import small_config, small_model
from tests.processes import Forked, environments

OVERRIDES = {"model__vocab_size": 512, "model__max_position_embeddings": 4096, "inference__threshold": 0.3}


@pytest.fixture(scope="module")
def checkpoint(corpus, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("served") / "small"
    weights = {name: parameter.detach() for name, parameter in small_model(**OVERRIDES).named_parameters()}
    write_weights_checkpoint(folder, weights, small_config(**OVERRIDES), corpus.tokenizer)
    return folder


@dataclass
class Process:
    """The command in a process of its own; the key that it was given is sent to it."""

    process: Forked
    port: int
    key: str | None = None

    @contextmanager
    def post(self, body: dict) -> Iterator[http.client.HTTPResponse]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        headers = {} if self.key is None else {"Authorization": f"Bearer {self.key}"}
        with closing(connection):
            connection.request("POST", "/v1/completions", json.dumps(body), headers)
            yield connection.getresponse()

    def answer(self, body: dict) -> tuple[int, dict]:
        with self.post(body) as response:
            return response.status, json.loads(response.read())

    def stop(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.process.wait(60)


@contextmanager
def started(
    *words: object, program: Callable[[], None] = start, key: str | None = None, env: Mapping[str, str] | None = None
) -> Iterator[Process]:
    """A server that has loaded its model."""
    env = {name: value for name, value in (env or os.environ).items() if name != "PONDER_API_KEY"}
    process = Forked("serve", *words, program=program, env=env, stderr=subprocess.PIPE)
    try:
        line = process.stderr.readline()
        found = re.fullmatch(r"serving small at http://127\.0\.0\.1:(\d+)\n", line)
        assert found, line + process.stderr.read()
        server = Process(process, int(found[1]), key)
        while server.answer({"max_tokens": 0})[0] == 503:  # between the line and the first step
            time.sleep(0.01)
        yield server
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


def test_a_server_from_its_start_to_its_end(checkpoint, tmp_path):
    """Its options reach the model, requests that run when SIGTERM comes are finished, and it ends with 0."""
    (tmp_path / "key").write_text("secret\n")
    options = ["--port", 0, "--threshold", 0.01, "--router-bias", 0.5, "--max-sequences", 2, "--queue-limit", 1]
    with started("--checkpoint", checkpoint, *options, "--api-key-file", tmp_path / "key", key="secret") as server:
        status, answer = server.answer({"prompt": [5, 90], "temperature": 0, "max_tokens": 8, "logprobs": 0})
        loaded = load_model(checkpoint)
        want = generate(loaded.model, [[5, 90]], 8, loaded.model.rule("hard", 0.01, 0.5))[0]
        assert (status, answer["model"]) == (200, "small")
        got = answer["choices"][0]["logprobs"]["token_logprobs"]
        assert got == pytest.approx(want.log_probabilities, abs=1e-4)
        assert answer["usage"]["executed_steps"] == sum(want.executed_steps)
        assert sum(generate(loaded.model, [[5, 90]], 8)[0].executed_steps) < sum(want.executed_steps)
        assert server.answer({"n": 4})[0] == 400
        assert Process(server.process, server.port).answer({})[0] == 401

        body = {"prompt": "a", "max_tokens": 100, "ignore_eos": True, "stream": True}
        with server.post(body) as response:
            first = response.readline()
            assert server.stop() == 0
            rest = response.read()
        assert first.startswith(b"data: ")
        assert rest.endswith(b"data: [DONE]\n\n")
        assert rest.count(b'"finish_reason":"length"') == 1
        assert server.process.stderr.read() == ""


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [["--tensor", 2], ["--pipeline", 2]], ids=["tensor", "pipeline"])
def test_a_server_on_two_ranks(checkpoint, sizes):
    """It waits, answers as one process does, and a signal to all ranks ends all of them well."""
    loaded = load_model(checkpoint)
    want = generate(loaded.model, [[5, 90]], 8)[0]
    first, second = environments(2)
    command = ["--checkpoint", checkpoint, "--port", 0, *sizes]
    other = Forked("serve", *command, env=second)
    try:
        with started(*command, env=first) as server:
            time.sleep(2)  # idle, in which the other rank hears from this one several times
            status, answer = server.answer({"prompt": [5, 90], "temperature": 0, "max_tokens": 8, "logprobs": 0})
            assert status == 200
            got = answer["choices"][0]["logprobs"]["token_logprobs"]
            assert got == pytest.approx(want.log_probabilities, abs=1e-4)
            assert answer["usage"]["executed_steps"] == sum(want.executed_steps)
            other.send_signal(signal.SIGTERM)
            assert server.stop() == 0
        assert other.wait(60) == 0
    finally:
        other.kill()
        other.wait()


@pytest.mark.slow
def test_a_rank_that_is_stopped_ends_streams_and_the_server(checkpoint):
    """Within the time that --step-timeout says, with words, and with a code of its own."""
    first, second = environments(2)
    command = ["--checkpoint", checkpoint, "--port", 0, "--tensor", 2, "--step-timeout", 3]
    other = Forked("serve", *command, env=second)
    try:
        with started(*command, env=first) as server:
            body = {"max_tokens": 4000, "ignore_eos": True, "stream": True}
            with server.post(body) as response:
                response.readline()
                other.send_signal(signal.SIGSTOP)
                begun = time.monotonic()
                last = response.read().split(b"data: ")[-1]
                assert json.loads(last)["error"]["code"] == "engine_failed"
            assert server.process.wait(60) == EXIT_HUNG
            # Ten times the longest step so far, if that is more than the limit; here steps take milliseconds.
            assert time.monotonic() - begun < 15
            assert "nothing has happened for" in (error := server.process.stderr.read())
            assert "(--step-timeout)" in error
    finally:
        other.kill()
        other.wait()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_no_grace(checkpoint, number):
    body = {"max_tokens": 4000, "ignore_eos": True, "stream": True}
    with started("--checkpoint", checkpoint, "--port", 0, "--grace", 0) as server, server.post(body) as response:
        response.readline()
        assert server.stop(number) == 0
        assert b'"finish_reason":"cancelled"' in response.read()


def test_mistakes_are_one_line(ponder, checkpoint, tmp_path):
    (tmp_path / "empty").write_text("\n")
    weights = {name: parameter.detach() for name, parameter in small_model().named_parameters()}
    write_weights_checkpoint(tmp_path / "bare", weights, small_config(), None)
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        mistakes = {
            ("--checkpoint", checkpoint, "--port", port): f"port {port}: address already in use; choose another --port",
            ("--checkpoint", checkpoint, "--api-key-file", tmp_path / "empty"): "the API key is empty",
            ("--checkpoint", checkpoint, "--api-key-file", tmp_path / "none"): "No such file",
            ("--checkpoint", checkpoint, "--queue-limit", -1): "queue_limit is -1; its range is 0 to",
            ("--checkpoint", checkpoint, "--timeout", 0): "timeout is 0; its range is above 0 to",
            ("--checkpoint", checkpoint, "--step-timeout", "nan"): "step_timeout is nan; its range is 1 to",
            ("--checkpoint", checkpoint, "--max-connections", 0): "max_connections is 0; its range is 1 to",
            ("--checkpoint", checkpoint, "--max-connections", 10**9): "allow more, or",
            ("--checkpoint", checkpoint, "--context", 2): "a run with context ranks generates without any",
            ("--checkpoint", checkpoint, "--router-bias", "inf"): "router_bias is inf; its range is -1,000 to 1,000",
            ("--checkpoint", checkpoint, "--port", 0, "--threshold", 2): "threshold is 2; its range is 0 to 1",
            ("--checkpoint", checkpoint, "--port", 0, "--confidence-exit", "margin:1"): "is for a model of mode fixed",
            ("--checkpoint", tmp_path / "missing", "--port", 0): "holds no complete checkpoint; give a run folder",
            ("--checkpoint", tmp_path / "bare", "--port", 0): "has no tokenizer; train with tokenizer.path set",
        }
        for arguments, words in mistakes.items():
            code, out, error = ponder("serve", *arguments)
            assert (code, out) == (2, "")
            assert error.startswith("error: ")
            assert error.count("\n") == 1
            assert words in error
    assert ponder("serve", "--checkpoint", tmp_path, "--host", "0.0.0.0", "--port", 0).err.startswith(
        "warning: other machines may reach this server, and it asks for no API key"
    )
    assert not [thread for thread in threading.enumerate() if thread.name == "web server"]


def test_without_the_extra(ponder, monkeypatch):
    for name in [name for name in sys.modules if name.startswith("megatron_ponder.serving")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "starlette.applications", None)
    ended = ponder("serve", "--help")
    assert ended.code == 2
    assert "starlette.applications: pip install 'megatron_ponder[serve]'" in ended.err


def fail_after_three_tokens() -> None:
    """The program of a server whose generator fails."""
    step = Generator.step

    def failing(generator: Generator) -> None:
        if generator.usage.tokens >= 3:
            raise RuntimeError("out of luck")
        step(generator)

    Generator.step = failing
    start()


def test_a_generator_that_fails_ends_the_process_with_its_traceback(checkpoint):
    with started("--checkpoint", checkpoint, "--port", 0, program=fail_after_three_tokens) as server:
        status, answer = server.answer({"max_tokens": 50, "ignore_eos": True})
        assert (status, answer["error"]["code"]) == (500, "engine_failed")
        assert server.process.wait(60) == 1
        error = server.process.stderr.read()
        assert "RuntimeError: out of luck" in error
        assert "the generator failed while it served" in error


def load_for_a_minute() -> None:
    """The program of a server that is still loading its model."""

    def slow(*_, **__) -> None:
        print("loading", file=sys.stderr, flush=True)
        threading.Event().wait(60)

    loading.load_model = slow
    start()


def test_a_signal_while_the_model_is_loaded(checkpoint):
    options = ["--checkpoint", checkpoint, "--port", 0]
    process = Forked("serve", *options, program=load_for_a_minute, stderr=subprocess.PIPE)
    assert process.stderr.readline() == "loading\n"
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=30)
    assert (process.returncode, error) == (0, "")


def test_the_official_client(checkpoint):
    with started("--checkpoint", checkpoint, "--port", 0) as server:
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="none", max_retries=0)
        assert [model.id for model in client.models.list()] == ["small"]
        arguments = {
            "model": "small",
            "prompt": ["import os", "def"],
            "max_tokens": 6,
            "seed": 3,
            "logprobs": 2,
            "n": 2,
        }
        whole = client.completions.create(**arguments)
        assert [choice.index for choice in whole.choices] == [0, 1, 2, 3]
        assert whole.usage.completion_tokens == sum(len(choice.logprobs.tokens) for choice in whole.choices)
        texts = [""] * 4
        for chunk in client.completions.create(**arguments, stream=True, stream_options={"include_usage": True}):
            for choice in chunk.choices:
                texts[choice.index] += choice.text
        assert texts == [choice.text for choice in whole.choices]
        assert chunk.usage == whole.usage
        own = client.completions.create(model="small", prompt="a", extra_body={"top_k": 1}, max_tokens=3)
        greedy = client.completions.create(model="small", prompt="a", temperature=0, max_tokens=3)
        assert own.choices[0].text == greedy.choices[0].text
        with pytest.raises(openai.BadRequestError, match="logit_bias is not supported") as caught:
            client.completions.create(model="small", prompt="a", logit_bias={"5": 1})
        assert caught.value.param == "logit_bias"
        with pytest.raises(openai.NotFoundError):
            client.completions.create(model="other", prompt="a")
        assert server.stop() == 0
