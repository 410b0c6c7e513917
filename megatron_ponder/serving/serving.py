"""One server process: the generator in the thread that calls, the web server in another."""

import ipaddress
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import uvicorn

from megatron_ponder.base.environment import LARGEST_PORT
from megatron_ponder.base.errors import UserError
from megatron_ponder.base.launch import Launch
from megatron_ponder.base.watchdog import Watchdog
from megatron_ponder.config.declarations import SECONDS, check_ranges, number_field
from megatron_ponder.generation.generator import Generator
from megatron_ponder.generation.loading import CheckedSetup, Setup, check_setup, load_generator
from megatron_ponder.parallel.collectives import from_first, together
from megatron_ponder.serving.application import Application, Limits
from megatron_ponder.serving.connections import Connection, ConnectionLimits
from megatron_ponder.serving.prometheus import Metrics
from megatron_ponder.serving.protocol import ServedModel
from megatron_ponder.serving.worker import Worker

# For answers to reach their clients once the generator has ended.
SECONDS_TO_SEND = 5
# For clients to hear of a generator that hangs, before the process ends.
SECONDS_TO_HEAR = 1.0
STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


@dataclass(frozen=True)
class Address:
    """Where a server listens.

    Attributes:
        host: name or address to listen on; 0.0.0.0 to be reached from other machines.
        port: number of the port; 0 for any that is free.
    """

    host: str = "127.0.0.1"
    port: int = number_field(8000, 0, LARGEST_PORT)

    def __post_init__(self) -> None:
        check_ranges(self)


@dataclass(frozen=True)
class Patience:
    """How many wait, and for how long.

    Attributes:
        queue_limit: sequences that may wait beside those that run; then clients get 429.
        step_timeout: seconds that a step of the generator may take, unless ten times the longest so far is more.
        grace: seconds that requests have to finish, after a signal.
    """

    queue_limit: int = number_field(64, 0, 10**9)
    step_timeout: float = number_field(60.0, 1, SECONDS)
    grace: float = number_field(30.0, 0, SECONDS)

    def __post_init__(self) -> None:
        check_ranges(self)


def listen(address: Address) -> socket.socket:
    """A listening socket.

    Raises:
        UserError: the address cannot be had.
    """
    try:
        family = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((address.host, address.port), family=family)
    except OSError as error:
        reason = error.strerror if isinstance(error, socket.gaierror) else os.strerror(error.errno)
        where = f"{address.host} port {address.port}"
        raise UserError(f"cannot listen on {where}: {reason.lower()}; choose another --port or --host") from None


def url(listening: socket.socket) -> str:
    """The address of the server behind a socket."""
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if listening.family == socket.AF_INET6 else f"http://{host}:{port}"


@contextmanager
def web_server(
    application: Application, listening: socket.socket, worker: Worker, connections: ConnectionLimits
) -> Iterator[None]:
    """Answer in another thread, from before the model is loaded until everything is answered.

    When the web server ends by itself, the worker is stopped; an error of its thread is raised at the end.
    """
    config = uvicorn.Config(
        application,
        lifespan="off",
        log_level="error",
        access_log=False,
        http=Connection.limited(connections),
        ws="none",
        loop="asyncio",
        timeout_keep_alive=connections.idle_timeout,
        timeout_graceful_shutdown=SECONDS_TO_SEND,
    )
    server = uvicorn.Server(config)
    errors: list[BaseException] = []

    def run() -> None:
        try:
            server.run(sockets=[listening])
        except BaseException as error:
            errors.append(error)
        finally:
            worker.stop(0)

    thread = threading.Thread(target=run, name="web server", daemon=True)
    thread.start()
    try:
        yield
    finally:
        server.should_exit = True
        # Longer than the server takes at most; a daemon, so that it cannot keep the process alive.
        thread.join(2 * SECONDS_TO_SEND + 5)
        listening.close()
    if errors:
        raise errors[0]


@contextmanager
def _stopped_by_signals(worker: Worker, grace: float) -> Iterator[None]:
    """The first SIGTERM, SIGINT or SIGHUP lets what runs finish, a second cancels it; while loading, one ends that.

    A SIGHUP that is ignored, as nohup wants it, stays so; a SIGINT that a shell ignores for what runs in the background
    does not, since somebody may well send it.
    """
    received = []

    def handle(number: int, frame: object) -> None:
        if worker.state == "loading":
            raise KeyboardInterrupt
        worker.stop(0 if received else grace)
        received.append(number)

    heard = [number for number in STOPPING if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, handle) for number in heard}
    try:
        yield
    except KeyboardInterrupt:
        if worker.state != "loading":
            raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@dataclass(frozen=True)
class Service:
    """A server, as a user wants it.

    Attributes:
        setup: of the generator.
        model_name: under which clients know the model.
        address: where it listens.
        limits: of requests.
        connections: limits of all clients together.
        patience: what waits.
    """

    setup: Setup
    model_name: str
    address: Address
    limits: Limits
    connections: ConnectionLimits
    patience: Patience


def run(service: Service, launch: Launch, device: torch.device) -> None:
    """Serve on all ranks of a job until a signal.

    Args:
        service: what is wanted, the same on every rank.
        launch: the place of this process among the ranks.
        device: where this rank computes.

    Raises:
        UserError: the model cannot be loaded, or the address cannot be had.
    """

    def check() -> CheckedSetup:
        checked = check_setup(service.setup, launch, device, copies=False)
        if checked.tokenizer() is None:
            raise UserError(f"{checked.folder} has no tokenizer; train with tokenizer.path set to serve text")
        return checked

    def load() -> tuple[Generator, ServedModel]:
        generator, loaded, _ = load_generator(from_first(check), launch, device)
        longest = loaded.config.model.max_position_embeddings
        return generator, ServedModel(service.model_name, loaded.tokenizer, longest, int(time.time()))

    first = launch.rank == 0
    listening = together(lambda: listen(service.address) if first else None)
    if first:
        serve(load, listening, service)
    else:
        follow(load)


def serve(load: Callable[[], tuple[Generator, ServedModel]], listening: socket.socket, service: Service) -> None:
    """Serve a model until SIGTERM, SIGINT or SIGHUP; call it in the main thread, on the rank that schedules.

    When nothing happens for too long, because another rank hangs, all clients hear of it and the process ends.

    Args:
        load: makes the generator; clients are told to wait meanwhile.
        listening: socket, which is closed at the end.
        service: limits and patience.

    Raises:
        UserError: the model cannot be loaded, or the system does not allow so many connections.
        RuntimeError: the generator failed; the cause is attached.
    """
    connections, patience = service.connections, service.patience
    connections.reserve_files()
    metrics = Metrics()
    worker = Worker(service.setup.batching.max_sequences + patience.queue_limit, metrics.observe)
    application = Application(worker, metrics, service.limits)

    def give_up() -> None:
        worker.give_up()
        time.sleep(SECONDS_TO_HEAR)

    if service.limits.api_key is None and not ipaddress.ip_address(listening.getsockname()[0]).is_loopback:
        print("warning: other machines may reach this server, and it asks for no API key", file=sys.stderr)
    with web_server(application, listening, worker, connections), _stopped_by_signals(worker, patience.grace):
        generator, application.model = load()
        print(f"serving {application.model.name} at {url(listening)}", file=sys.stderr, flush=True)
        with Watchdog(patience.step_timeout, "--step-timeout", give_up) as watchdog, generator:
            try:
                worker.serve(generator, watchdog.beat)
            except Exception as error:
                raise RuntimeError("the generator failed while it served") from error


def follow(load: Callable[[], tuple[Generator, ServedModel]]) -> None:
    """Take part in what the rank that serves runs, until it stops; signals are for that rank to obey.

    Args:
        load: makes this rank's generator.

    Raises:
        UserError: the model cannot be loaded.
    """
    for number in STOPPING:
        signal.signal(number, signal.SIG_IGN)
    generator, _ = load()
    with generator:
        pass
