"""A real server on a free port, asked over HTTP."""

import http.client
import json
import re
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass

import pytest

from megatron_ponder.data.tokenizer import Tokenizer, load_tokenizer
from megatron_ponder.generation.generate import generate
from megatron_ponder.generation.generator import Generator
from megatron_ponder.generation.prefill import Prefill
from megatron_ponder.generation.sampling import Sampling
from megatron_ponder.generation.sequences import Batching
from megatron_ponder.generation.text_stream import TextStream
from megatron_ponder.model.ponder import PonderLM
from megatron_ponder.serving.application import Application, Limits
from megatron_ponder.serving.connections import ConnectionLimits
from megatron_ponder.serving.prometheus import Metrics
from megatron_ponder.serving.protocol import ServedModel
from megatron_ponder.serving.serving import Address, listen, web_server
from megatron_ponder.serving.worker import Worker
from tests.models import small_model

LONGEST = 256
SECONDS = 60.0


@dataclass(frozen=True)
class Served:
    """A model in fp64, so that a drawn token cannot depend on the rounding of its batch."""

    model: PonderLM
    tokenizer: Tokenizer


@pytest.fixture(scope="module")
def served(corpus) -> Served:
    overrides = {"model__vocab_size": 512, "model__max_position_embeddings": LONGEST, "inference__threshold": 0.3}
    return Served(small_model(**overrides).eval(), load_tokenizer(corpus.tokenizer))


class Client:
    """Asks a server on this machine."""

    def __init__(self, port: int, **headers: str) -> None:
        self.port, self.headers = port, headers

    def open(self, body: dict | bytes, path: str = "/v1/completions") -> http.client.HTTPConnection:
        """A connection on which a request was sent."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=SECONDS)
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        connection.request("POST", path, content, self.headers)
        return connection

    def post(self, body: dict | bytes) -> tuple[int, dict]:
        with closing(self.open(body)) as connection:
            response = connection.getresponse()
            return response.status, json.loads(response.read())

    def stream(self, body: dict) -> list[dict]:
        """The chunks of a stream that ends as it should."""
        with closing(self.open(body | {"stream": True})) as connection:
            response = connection.getresponse()
            assert response.headers["content-type"].startswith("text/event-stream")
            *events, done, rest = response.read().decode().split("\n\n")
        assert (response.status, done, rest) == (200, "data: [DONE]", "")
        return [json.loads(event.removeprefix("data: ")) for event in events]

    def get(self, path: str) -> tuple[int, str]:
        with closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=SECONDS)) as connection:
            connection.request("GET", path, headers=self.headers)
            response = connection.getresponse()
            return response.status, response.read().decode()

    def metric(self, name: str) -> float:
        """One value of /metrics; 0 for one that has not occurred."""
        found = re.search(rf"^{re.escape(name)} (\S+)$", self.get("/metrics")[1], re.MULTILINE)
        return float(found[1]) if found else 0.0


@dataclass
class Running:
    """A server in threads of this process. `failure` is what ended its generator."""

    client: Client
    worker: Worker
    generator: Generator
    failure: BaseException | None = None

    def wait(self, condition) -> None:
        """Until something is so."""
        deadline = time.monotonic() + SECONDS
        while not condition():
            assert time.monotonic() < deadline
            time.sleep(0.005)

    @property
    def at_rest(self) -> bool:
        return self.worker._accepted == 0 and self.generator.idle


@contextmanager
def running(
    served: Served,
    limits: Limits | None = None,
    waiting: int = 64,
    slots: int = 1 << 17,
    gate: threading.Event | None = None,
    connections: ConnectionLimits | None = None,
) -> Iterator[Running]:
    """Serve; afterwards nothing may be left of any request.

    Args:
        served: the model.
        limits: of requests; the defaults unless given.
        waiting: sequences that may wait beside the four that run.
        slots: in the cache at once.
        gate: holds every step of the generator up until it is set.
        connections: limits of all of them; the defaults unless given.
    """
    limits = limits or Limits()
    generator = Generator(
        served.model, batching=Batching(4, slots, prefill=Prefill(shortest=2)), tokenizer=served.tokenizer
    )
    if gate is not None:
        step = generator.step
        generator.step = lambda: gate.wait(SECONDS) and step()
    metrics = Metrics()
    worker = Worker(4 + waiting, metrics.observe)
    application = Application(worker, metrics, limits)
    listening = listen(Address(port=0))
    headers = {} if limits.api_key is None else {"Authorization": f"Bearer {limits.api_key}"}
    running = Running(Client(listening.getsockname()[1], **headers), worker, generator)

    def own_generator() -> None:
        try:
            with generator:
                worker.serve(generator)
        except BaseException as error:
            running.failure = error

    thread = threading.Thread(target=own_generator, daemon=True)
    with web_server(application, listening, worker, connections or ConnectionLimits()):
        assert running.client.get("/health") == (503, '{"status":"loading"}')
        assert running.client.post({"prompt": "a"})[0] == 503
        application.model = ServedModel("small", served.tokenizer, LONGEST, 0)
        thread.start()
        running.wait(lambda: worker.state == "ready")
        assert running.client.get("/health") == (200, '{"status":"ok"}')
        try:
            yield running
        finally:
            if gate is not None:
                gate.set()
            worker.stop(SECONDS)
            thread.join(SECONDS)
    assert not thread.is_alive()
    if running.failure is None:
        assert worker.state == "stopped"
        assert running.at_rest
        assert (generator.live, generator.waiting, generator.cached_slots) == ([], 0, 0)
        assert generator._runners[0].cache.reserved == 0


@pytest.fixture(scope="module")
def server(served) -> Iterator[Running]:
    with running(served) as server:
        yield server


def expected(served: Served, body: dict) -> dict:
    """The answer, from `generate` of one prompt at a time and a text that is cut afterwards."""
    tokenizer, choices, used, fed, executed = served.tokenizer, [], 0, 0, 0
    prompts = body["prompt"]
    if isinstance(prompts, str) or isinstance(prompts[0], int):
        prompts = [prompts]
    stops = [body["stop"]] if isinstance(body.get("stop"), str) else body.get("stop", [])
    for prompt in prompts:
        ids = (tokenizer.encode(prompt) or [tokenizer.eod_id]) if isinstance(prompt, str) else prompt
        for sample in range(body.get("n", 1)):
            sampling = Sampling(
                body.get("repetition_penalty", 1.0),
                body.get("temperature", 1.0),
                body.get("top_k", 0),
                body.get("top_p", 1.0),
                body.get("min_p", 0.0),
                body.get("seed", 0) + sample,
            )
            most = body.get("max_tokens", 16)
            result = generate(served.model, [ids], most, sampling=sampling, stop_ids=[tokenizer.eod_id])[0]
            stream, tokens, reason = TextStream(tokenizer, ids), [], result.finish_reason
            for token in result.tokens:
                tokens.append(token)
                if token != tokenizer.eod_id:
                    stream.add(token)
                if any(stop in stream.text for stop in stops):
                    break
            else:
                stream.close()
            text = stream.text
            places = [text.index(stop) for stop in stops if stop in text]
            if places:
                text, reason = text[: min(places)], "stop"
            values = result.log_probabilities[: len(tokens)]
            choices.append({"text": text, "finish_reason": reason, "token_logprobs": values})
            used += len(tokens)
            steps = result.executed_steps[: len(ids) + max(0, len(tokens) - 1)] if most else []
            fed, executed = fed + len(steps), executed + sum(steps)
    return {"choices": choices, "completion_tokens": used, "fed": fed, "executed_steps": executed}


def check(served: Served, body: dict, answer: dict) -> None:
    """An answer is right."""
    check_equal(expected(served, body), body, answer)


def check_equal(want: dict, body: dict, answer: dict) -> None:
    assert len(answer["choices"]) == len(want["choices"])
    for index, (choice, right) in enumerate(zip(answer["choices"], want["choices"], strict=True)):
        assert choice["index"] == index
        assert (choice["text"], choice["finish_reason"]) == (right["text"], right["finish_reason"])
        if "logprobs" in body:
            assert choice["logprobs"]["token_logprobs"] == pytest.approx(right["token_logprobs"], abs=1e-9)
        else:
            assert choice["logprobs"] is None
    usage = answer["usage"]
    assert usage["completion_tokens"] == want["completion_tokens"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert usage["executed_steps"] == want["executed_steps"]
    assert usage["mean_steps"] == pytest.approx(want["executed_steps"] / max(1, want["fed"]))


def joined(chunks: Sequence[dict]) -> dict:
    """The whole answer that a stream with usage adds up to."""
    *parts, last = chunks
    assert last["choices"] == []
    assert len({(chunk["id"], chunk["model"], chunk["object"]) for chunk in chunks}) == 1
    choices: dict[int, dict] = {}
    for part in parts:
        assert part["usage"] is None
        (new,) = part["choices"]
        choice = choices.setdefault(new["index"], new | {"text": "", "logprobs": None, "finish_reason": None})
        assert choice["finish_reason"] is None
        choice["text"] += new["text"]
        choice["finish_reason"] = new["finish_reason"]
        if new["logprobs"] is not None:
            before = choice["logprobs"] or {key: [] for key in new["logprobs"]}
            choice["logprobs"] = {key: before[key] + new["logprobs"][key] for key in before}
    return {"choices": [choices[index] for index in sorted(choices)], "usage": last["usage"]}


BODIES = [
    {"prompt": "import os\n", "temperature": 0},
    {"prompt": "", "temperature": 0, "max_tokens": 9},
    {"prompt": "def main(argv):", "seed": 3, "n": 3, "max_tokens": 7, "logprobs": 0},
    {"prompt": ["class A", "naïve ☕"], "seed": 5, "top_p": 0.9, "n": 2, "logprobs": 2},
    {"prompt": [5, 90, 17], "seed": 5, "top_k": 4, "logprobs": 5},
    {"prompt": [[5], [90, 17]], "seed": 5, "min_p": 0.2, "temperature": 0.7},
    {"prompt": "for i in", "seed": 0, "stop": ["e", "s"], "max_tokens": 60, "logprobs": 1},
    {"prompt": "for i in", "max_tokens": 0},
]


@pytest.mark.parametrize("body", BODIES, ids=range(len(BODIES)))
def test_answers_equal_generate_streamed_or_not(served, server, body):
    status, answer = server.client.post(body)
    assert status == 200
    assert answer["object"] == "text_completion"
    assert answer["model"] == "small"
    check(served, body, answer)
    if "seed" in body or body.get("temperature") == 0:
        streamed = joined(server.client.stream(body | {"stream_options": {"include_usage": True}}))
        assert streamed == {key: answer[key] for key in streamed}


def test_models_vary_in_their_steps(served):
    """Otherwise the counts above would show nothing."""
    results = generate(served.model, [[5, 90, 17]], 30)[0]
    assert len(set(results.executed_steps)) > 1


def test_the_stop_string_was_met(server):
    _, answer = server.client.post(BODIES[6])
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert 0 < answer["usage"]["completion_tokens"] < 60


def test_log_probabilities_name_tokens_and_their_places(server):
    _, answer = server.client.post({"prompt": "import", "seed": 1, "logprobs": 3, "max_tokens": 12, "stop": "\0"})
    choice, names = answer["choices"][0], answer["choices"][0]["logprobs"]
    for token, value, top, at in zip(*names.values(), strict=True):
        assert top[token] == value
        assert 3 <= len(top) <= 4
        assert list(top.values())[:3] == sorted(top.values(), reverse=True)[:3]
        if not re.fullmatch("<0x..>", token):
            assert choice["text"][at:].startswith(token)


def test_echo_best_of_and_random_seeds(served, server):
    body = {"prompt": ["def f(", "if"], "seed": 2, "max_tokens": 6}
    plain = server.client.post(body)[1]["choices"]
    for echoed in (
        server.client.post(body | {"echo": True})[1]["choices"],
        joined(server.client.stream(body | {"echo": True, "stream_options": {"include_usage": True}}))["choices"],
    ):
        assert [choice["text"] for choice in echoed] == ["def f(" + plain[0]["text"], "if" + plain[1]["text"]]
    _, all_of_them = server.client.post(body | {"n": 5, "logprobs": 0})
    _, best = server.client.post(body | {"n": 2, "best_of": 5, "logprobs": 0})

    def mean(choice):
        return sum(choice["logprobs"]["token_logprobs"]) / 6

    for prompt in range(2):
        ranked = sorted(all_of_them["choices"][5 * prompt : 5 * prompt + 5], key=mean, reverse=True)
        assert [choice["text"] for choice in best["choices"][2 * prompt : 2 * prompt + 2]] == [
            choice["text"] for choice in ranked[:2]
        ]
    assert best["usage"]["completion_tokens"] == 2 * 5 * 6
    _, unseeded = server.client.post({"prompt": "a", "n": 4, "max_tokens": 10})
    assert len({choice["text"] for choice in unseeded["choices"]}) == 4


def test_models_and_other_paths(server):
    status, text = server.client.get("/v1/models")
    (model,) = json.loads(text)["data"]
    assert (status, model["id"], model["object"]) == (200, "small", "model")
    assert json.loads(server.client.get("/v1/models/small")[1]) == model
    for path, status in (("/v1/models/other", 404), ("/v1/nothing", 404), ("/v1/completions", 405)):
        code, text = server.client.get(path)
        assert code == status
        assert json.loads(text)["error"].keys() == {"message", "type", "param", "code"}


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/embeddings", "/v1/responses", "/chat/completions"])
def test_other_paths_of_openai_say_what_is_offered(server, path):
    with closing(server.client.open({"model": "small", "messages": [{"role": "user", "content": "a"}]}, path)) as asked:
        response = asked.getresponse()
        error = json.loads(response.read())["error"]
    assert (response.status, error["code"]) == (404, "not_offered")
    assert f"{path} is not offered here, but POST /v1/completions, GET /v1/models" in error["message"]
    assert ("send conversations and the like to /v1/completions as one prompt" in error["message"]) == ("/v1" in path)


def test_metrics_count(served):
    with running(served) as server:
        bodies = [{"prompt": "import", "seed": seed, "max_tokens": 10} for seed in range(6)]
        with ThreadPoolExecutor(6) as pool:
            answers = [answer for _, answer in pool.map(server.client.post, bodies)]
        assert server.client.post({"prompt": []})[0] == 400
        tokens = sum(answer["usage"]["completion_tokens"] for answer in answers)
        steps = sum(answer["usage"]["executed_steps"] for answer in answers)
        metric = server.client.metric
        assert metric('ponder_requests_total{path="/v1/completions",status="200"}') == 6
        assert metric('ponder_requests_total{path="/v1/completions",status="400"}') == 1
        assert metric("ponder_tokens_generated_total") == tokens
        assert metric("ponder_executed_steps_total") == steps
        assert metric("ponder_mean_executed_steps") == pytest.approx(steps / metric("ponder_fed_tokens_total"))
        assert metric("ponder_time_to_first_token_seconds_count") == 6
        assert metric("ponder_time_per_token_seconds_count") == 6
        assert metric("ponder_forwards_total") > 0
        assert metric("ponder_slots_run_total") >= metric("ponder_fed_tokens_total") + steps
        assert metric("ponder_rows_per_forward") == pytest.approx(
            metric("ponder_rows_total") / metric("ponder_forwards_total")
        )
        for gauge in ("ponder_queue_length", "ponder_live_sequences", "ponder_cached_slots"):
            assert f"\n{gauge} 0.0\n" in server.client.get("/metrics")[1]
