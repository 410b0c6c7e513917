"""How the ranks of a run find each other, and what is said when one does not come."""

import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch.distributed as dist

from megatron_ponder.base.errors import UserError
from megatron_ponder.base.launch import Launch

# For what listens where rank 0 should, after the time in which all ranks should have come.
SECONDS_TO_ANSWER = 10.0


def meet(launch: Launch, patience: float, timeout: timedelta) -> dist.Store:
    """The store through which all ranks find each other, once all have come; of this start of theirs alone.

    Args:
        launch: the place of this process among the ranks.
        patience: seconds to wait for the other ranks.
        timeout: that a rank waits for an entry of the store later on.

    Raises:
        UserError: they have not within `patience` seconds, or the port is another program's.
    """
    under_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # torchrun has a store already
    if launch.world_size == 1 and not under_agent:
        return dist.HashStore()
    hosts = launch.rank == 0 and not under_agent
    where = f"{launch.address}:{launch.port}"
    gone = (
        f"not all {launch.world_size} ranks have come to {where} within {patience:.0f} seconds; look whether every "
        "rank has been started, and whether all have the MASTER_ADDR and MASTER_PORT of the node of rank 0"
    )
    with _given_up_after(patience + SECONDS_TO_ANSWER, f"rank {launch.rank}: error: {gone}"):
        begun = time.monotonic()
        if not hosts:
            _wait_for_listener(launch, patience)
        left = max(1.0, patience - (time.monotonic() - begun))
        try:
            store = dist.TCPStore(
                "localhost" if hosts else launch.address,
                launch.port,
                launch.world_size,
                is_master=hosts,
                timeout=timedelta(seconds=left),
                multi_tenant=not under_agent,
            )
        except dist.DistError as error:
            if "EADDRINUSE" in str(error):
                raise UserError(
                    f"port {launch.port} on {socket.gethostname()} is in use by another program, or by ranks that an "
                    "earlier run has left; set MASTER_PORT to another port on every rank"
                ) from error
            raise UserError(gone) from error
    store.set_timeout(timeout)
    # torchrun's outlives ranks that it starts again, and what they have said in it
    return dist.PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def _wait_for_listener(launch: Launch, patience: float) -> None:
    """Wait until something listens where rank 0 should."""
    deadline = time.monotonic() + patience
    while True:
        try:
            socket.create_connection((launch.address, launch.port), timeout=min(10.0, patience)).close()
            return
        except OSError as error:
            if time.monotonic() >= deadline:
                raise UserError(
                    f"rank {launch.rank} has not reached rank 0 at {launch.address}:{launch.port} within "
                    f"{patience:.0f} seconds ({error.strerror or error}); set MASTER_ADDR to the host name or address "
                    "of the node of rank 0, and MASTER_PORT to a port that is open between the nodes"
                ) from error
            time.sleep(min(0.2, patience))


@contextmanager
def _given_up_after(seconds: float, message: str) -> Iterator[None]:
    """End the process with a message and code 2 if the block takes longer; what answers may be no rank at all."""

    def give_up() -> None:
        print(message, file=sys.stderr, flush=True)
        os._exit(2)

    timer = threading.Timer(seconds, give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
