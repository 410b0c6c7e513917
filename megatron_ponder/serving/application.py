"""The web application: routes, refusals, streams, and clients that leave."""

import asyncio
import hmac
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Message, Receive, Scope, Send

from megatron_ponder.base.errors import UserError
from megatron_ponder.config.declarations import SECONDS, check_ranges, number_field
from megatron_ponder.serving.answers import Answer
from megatron_ponder.serving.prometheus import Metrics
from megatron_ponder.serving.protocol import Completion, ServedModel, parse, requests_for
from megatron_ponder.serving.refusals import RefusedError
from megatron_ponder.serving.worker import (
    EngineFailedError,
    Event,
    Progress,
    QueueFullError,
    RequestGroup,
    RequestGroupFailedError,
    UnavailableError,
    Worker,
)

# What nginx made the custom for clients that left before their answer; nobody reads it but the metrics.
CLIENT_LEFT = 499
RETRY_SECONDS = 1
OFFERED = ("POST /v1/completions", "GET /v1/models", "GET /health", "GET /metrics")


@dataclass(frozen=True)
class Limits:
    """What a client may take.

    Attributes:
        timeout: seconds for the body of a request to arrive, and then for its answer, waiting included.
        max_body_bytes: size of a request.
        api_key: that clients must send; None for none.
    """

    timeout: float = number_field(600.0, 0, SECONDS, above=True)
    max_body_bytes: int = number_field(1 << 20, 1, 1 << 40)
    api_key: str | None = None

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.api_key is not None and not self.api_key.strip():
            raise UserError("the API key is empty; give one, or none at all")
        if self.api_key is not None and not (self.api_key.isascii() and self.api_key.isprintable()):
            raise UserError("the API key has other characters than a header may have; use letters and digits")
        if self.api_key is not None and self.api_key != self.api_key.strip():
            raise UserError("the API key begins or ends with a space, which no header keeps; leave the space out")


class Application:
    """ASGI application of one model.

    Attributes:
        model: set before the worker becomes ready.
    """

    def __init__(self, worker: Worker, metrics: Metrics, limits: Limits) -> None:
        self.model: ServedModel | None = None
        self._worker, self._metrics, self._limits = worker, metrics, limits
        metrics.watch(lambda: worker.snapshot)
        routes = [
            Route("/v1/completions", self._completions, methods=["POST"]),
            Route("/v1/models", self._models),
            Route("/v1/models/{name:path}", self._one_model),
            Route("/health", self._health),
            Route("/metrics", self._show_metrics),
        ]
        self._paths = {offered.split()[1] for offered in OFFERED}
        handlers = {RefusedError: _refused, HTTPException: _refused_by_route, Exception: _broken}
        self._app = Starlette(routes=routes, exception_handlers=handlers)
        self._app.router.redirect_slashes = False  # clients that send a body seldom follow

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                path = scope["path"] if scope["path"] in self._paths else "other"
                self._metrics.count_request(path, message["status"])
            await send(message)

        if scope["path"] != "/health" and not self._authorized(scope):
            refusal = RefusedError(
                401, "send the server's API key as `Authorization: Bearer KEY`", code="invalid_api_key"
            )
            await refusal.response()(scope, receive, counted)
        else:
            await self._app(scope, receive, counted)

    def _authorized(self, scope: Scope) -> bool:
        if self._limits.api_key is None:
            return True
        scheme, _, given = dict(scope["headers"]).get(b"authorization", b"").partition(b" ")
        return scheme.lower() == b"bearer" and hmac.compare_digest(given.strip(), self._limits.api_key.encode())

    async def _health(self, request: Request) -> Response:
        ready = self._worker.state == "ready"
        return JSONResponse({"status": "ok" if ready else self._worker.state}, 200 if ready else 503)

    async def _show_metrics(self, request: Request) -> Response:
        return Response(self._metrics.text(), media_type="text/plain; version=0.0.4")

    async def _models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._ready_model().describe()]})

    async def _one_model(self, request: Request) -> Response:
        model, name = self._ready_model(), request.path_params["name"]
        if name != model.name:
            raise RefusedError(404, f"the model {name!r} is not served here; ask for {model.name!r}", "model")
        return JSONResponse(model.describe())

    def _ready_model(self) -> ServedModel:
        if self.model is None:
            raise RefusedError(503, f"the server is {self._worker.state}", retry_after=RETRY_SECONDS)
        return self.model

    async def _completions(self, request: Request) -> Response:
        model = self._ready_model()
        try:
            body = await asyncio.wait_for(_read(request, self._limits.max_body_bytes), self._limits.timeout)
        except asyncio.TimeoutError:
            raise RefusedError(408, "the body of the request did not arrive in time", code="timeout") from None
        except ClientDisconnect:
            return Response(status_code=CLIENT_LEFT)
        # In another thread, because a long prompt takes a while to encode and streams must not wait for it.
        completion, requests = await run_in_threadpool(self._understand, body, model)
        exchange = _Exchange(self._worker, requests, completion.stream, request.receive, self._limits.timeout)
        try:
            answer = Answer(completion, requests, model)
            if completion.stream:
                first = await exchange.next()  # so that what fails at once has a status of its own
                _refuse_unfinished(first)
                return _EventStream(_chunks(exchange, answer, first), exchange)
            results = [await exchange.next() for _ in requests]
            for progress in results:
                _refuse_unfinished(progress)
            content = answer.whole(sorted(results, key=lambda progress: progress.index))
        except _ClientLeftError:
            exchange.close()
            return Response(status_code=CLIENT_LEFT)
        except BaseException:
            exchange.close()
            raise
        exchange.close()
        return JSONResponse(content)

    def _understand(self, body: bytes, model: ServedModel) -> tuple[Completion, list]:
        completion = parse(body)
        return completion, requests_for(completion, model, self._worker.most_sequences)


class _ClientLeftError(Exception):
    """Nobody waits for the answer."""


class _Exchange:
    """A job and the client that waits for it."""

    def __init__(self, worker: Worker, requests: list, streams: bool, receive: Receive, seconds: float) -> None:
        """Submit the job.

        Raises:
            RefusedError: it is not taken.
        """
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[Event | RefusedError | _ClientLeftError] = asyncio.Queue()
        self._worker, self._job = worker, RequestGroup(requests, streams, self._post)
        self.count = len(requests)
        try:
            worker.submit(self._job)
        except QueueFullError as error:
            raise RefusedError(429, str(error), code="queue_full", retry_after=RETRY_SECONDS) from None
        except UnavailableError as error:
            raise RefusedError(503, str(error), retry_after=RETRY_SECONDS) from None
        timed_out = RefusedError(504, f"the request took more than {seconds:g} s", code="timeout")
        self._timer = self._loop.call_later(seconds, self._events.put_nowait, timed_out)
        self._watch = self._loop.create_task(self._watch_client(receive))

    async def next(self) -> Progress:
        """Wait for progress.

        Raises:
            RefusedError: instead of an answer.
            _ClientLeftError: nobody waits any more.
        """
        event = await self._events.get()
        if isinstance(event, UserError):
            raise RefusedError(400, str(event), code="invalid_value")
        if isinstance(event, EngineFailedError):
            raise RefusedError(500, str(event), code="engine_failed")
        if isinstance(event, RequestGroupFailedError):
            raise RefusedError(500, str(event), code="generation_failed")
        if isinstance(event, Exception):
            raise event
        return event

    def cancel(self) -> None:
        """Let go of what is left; `next` still gives how it ends."""
        self._worker.cancel(self._job)

    def close(self) -> None:
        """Nobody waits for progress any more."""
        self.cancel()
        self._timer.cancel()
        self._watch.cancel()

    def _post(self, events: list[Event]) -> None:
        """Called in the worker's thread."""
        try:
            self._loop.call_soon_threadsafe(self._take, events)
        except RuntimeError:
            if not self._loop.is_closed():
                raise
            # The web server has ended, and nobody waits.

    def _take(self, events: list[Event]) -> None:
        for event in events:
            self._events.put_nowait(event)

    async def _watch_client(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self._events.put_nowait(_ClientLeftError())


async def _chunks(exchange: _Exchange, answer: Answer, progress: Progress) -> AsyncIterator[bytes]:
    """Server-sent events; the first progress has come already."""
    finished: list[Progress] = []
    while True:
        if progress.finish_reason == "failed":
            yield _event(RefusedError(500, progress.error, code="generation_failed").content)
            return
        chunk = answer.chunk(progress)
        if chunk is not None:
            yield _event(chunk)
        if progress.finish_reason is not None:
            finished.append(progress)
        if len(finished) == exchange.count:
            break
        try:
            progress = await exchange.next()
        except RefusedError as refusal:
            if refusal.status != 504:
                yield _event(refusal.content)
                return
            # Too late for another status: what is left ends as cancelled.
            exchange.cancel()
            progress = await exchange.next()
    last = answer.last_chunk(finished)
    if last is not None:
        yield _event(last)
    yield b"data: [DONE]\n\n"


def _event(content: dict) -> bytes:
    text = json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return f"data: {text}\n\n".encode()


class _EventStream(Response):
    """A response of server-sent events, whose exchange ends with it, however it ends."""

    def __init__(self, chunks: AsyncIterator[bytes], exchange: _Exchange) -> None:
        super().__init__(headers={"Cache-Control": "no-cache"}, media_type="text/event-stream")
        del self.headers["content-length"]
        self._chunks, self._exchange = chunks, exchange

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            async for chunk in self._chunks:
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
            await send({"type": "http.response.body", "body": b""})
        except _ClientLeftError:
            pass
        finally:
            self._exchange.close()


async def _read(request: Request, limit: int) -> bytes:
    """The body.

    Raises:
        RefusedError: it is larger than allowed.
        ClientDisconnect: it ends before its end.
    """
    too_large = RefusedError(413, f"the body is larger than {limit} bytes; send less at a time", code="too_large")
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length) > limit:
        raise too_large
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > limit:
            raise too_large
    return bytes(body)


def _refuse_unfinished(progress: Progress) -> None:
    """A sequence that failed fails its answer; only a server that stops cancels what a client still waits for."""
    if progress.finish_reason == "failed":
        raise RefusedError(500, progress.error, code="generation_failed")
    if progress.finish_reason == "cancelled":
        raise RefusedError(503, "the server is stopping", retry_after=RETRY_SECONDS)


async def _refused(request: Request, refusal: RefusedError) -> Response:
    return refusal.response()


async def _refused_by_route(request: Request, error: HTTPException) -> Response:
    """What is offered instead, because clients of OpenAI's ask for more than this server has."""
    method, path = request.method, request.url.path
    message = f"{error.detail}: {method} {path}"
    if error.status_code == 404:
        message = f"{path} is not offered here, but {', '.join(OFFERED)}"
        if path.startswith("/v1/") and method == "POST":
            message += "; the model continues texts: send conversations and the like to /v1/completions as one prompt"
    response = RefusedError(error.status_code, message, code="not_offered").response()
    response.headers.update(error.headers or {})
    return response


async def _broken(request: Request, error: Exception) -> Response:
    return RefusedError(500, "the server has a bug; see its log").response()
