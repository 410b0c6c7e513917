"""Connections that clients open: how many there may be, and how long one may keep the server waiting."""

import asyncio
import resource
import socket
from contextlib import suppress
from dataclasses import dataclass

import h11
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from megatron_ponder.base.errors import UserError
from megatron_ponder.config.declarations import check_ranges, number_field
from megatron_ponder.serving.refusals import RefusedError

# Beyond the limit, so many more are told so, for which each has a moment; others are closed without a word.
SPARE = 64
SECONDS_TO_BE_REFUSED = 2.0
# Files that the process has open beside its connections.
OTHER_FILES = 128


@dataclass(frozen=True)
class ConnectionLimits:
    """What all clients together may take.

    Attributes:
        max_connections: connections open at a time.
        idle_timeout: seconds for the head of a request to arrive, and for the next one to begin after an answer.
    """

    max_connections: int = number_field(512, 1, 10**9)
    idle_timeout: float = number_field(10.0, 0, 3600, above=True)

    def __post_init__(self) -> None:
        check_ranges(self)

    def reserve_files(self) -> None:
        """Let this process open a file for each connection.

        Raises:
            UserError: the system does not allow so many.
        """
        needed = self.max_connections + SPARE + OTHER_FILES
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if hard != resource.RLIM_INFINITY and needed > hard:
            most = hard - SPARE - OTHER_FILES
            raise UserError(
                f"{self.max_connections} connections need {needed} open files, but the system allows {hard} "
                f"(ulimit -Hn); allow more, or {max(1, most)} connections"
            )
        if soft != resource.RLIM_INFINITY and needed > soft:
            resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


class Connection(H11Protocol):
    """One connection, which is closed when the client is slow with the head of a request, or one too many.

    While a request is answered, the application minds the time. Between requests, uvicorn's keep-alive does.
    """

    limits = ConnectionLimits()

    @classmethod
    def limited(cls, limits: ConnectionLimits) -> type["Connection"]:
        """Connections with these limits."""
        return type(cls.__name__, (cls,), {"limits": limits})

    def __init__(self, *arguments, **options) -> None:
        super().__init__(*arguments, **options)
        self._patience: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        # Otherwise the second half of an answer waits for the client to acknowledge the first, 40 ms.
        transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        too_many = len(self.connections) - self.limits.max_connections
        if too_many > SPARE:
            transport.abort()
            return
        if too_many > 0:
            self.app = self._refusing_all_but_health
        self._wait(self.limits.idle_timeout if too_many <= 0 else min(SECONDS_TO_BE_REFUSED, self.limits.idle_timeout))

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop_waiting()
        elif self._patience is None and not self.transport.is_closing():
            self._wait(self.limits.idle_timeout)

    def send_400_response(self, msg: str) -> None:
        """What is no HTTP has an answer in the form of all others."""
        self._refuse(RefusedError(400, f"this is not HTTP/1.1, or has a head that is too long: {msg}"))

    def _wait(self, seconds: float) -> None:
        self._patience = self.loop.call_later(seconds, self._time_is_over)

    def _stop_waiting(self) -> None:
        if self._patience is not None:
            self._patience.cancel()
            self._patience = None

    def _time_is_over(self) -> None:
        self._patience = None
        if self.conn.trailing_data[0] and self.conn.our_state is h11.IDLE:
            self._refuse(RefusedError(408, "the head of the request did not arrive in time", code="timeout"))
        else:
            self.transport.close()
        # A client that does not read what it was sent is not waited for either.
        self.loop.call_later(self.limits.idle_timeout, self.transport.abort)

    def _refuse(self, refusal: RefusedError) -> None:
        response = refusal.response()
        headers = [*response.raw_headers, (b"connection", b"close")]
        try:
            for event in (
                h11.Response(status_code=refusal.status, headers=headers),
                h11.Data(data=response.body),
                h11.EndOfMessage(),
            ):
                self.transport.write(self.conn.send(event))
        except h11.LocalProtocolError:
            pass  # an answer is under way, which this cannot follow
        self.transport.close()

    async def _refusing_all_but_health(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] == "/health":
            await self.config.loaded_app(scope, receive, send)
            return
        with suppress(asyncio.TimeoutError):
            await asyncio.wait_for(_drain(receive), SECONDS_TO_BE_REFUSED)
        message = f"{self.limits.max_connections} connections are open already; try again later"
        response = RefusedError(503, message, code="too_many_connections", retry_after=1).response()
        response.headers["Connection"] = "close"
        await response(scope, receive, send)


async def _drain(receive: Receive) -> None:
    """Read a body to its end: closing a connection on which something still comes would take the answer back."""
    while (await receive()).get("more_body"):
        pass
