"""torchrun for jobs that are told to save: signals reach the ranks, and their exit code is its own.

torchrun itself dies of SIGUSR1, answers SIGTERM by ending its ranks after half a minute, and Ctrl-C with a traceback
when they have saved. It ends with 1 whatever their code was, so that a script cannot tell a run that has saved and
wants to go on from one that has failed.
"""

import os
import signal
import sys
from collections.abc import Sequence

import psutil

from megatron_ponder.base.environment import read_number
from megatron_ponder.base.errors import EXIT_PREEMPTED

FORWARDED = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)


def torchrun(arguments: Sequence[str]) -> int:
    """Do what torchrun does with these arguments, and return the exit code of the ranks of this node.

    SIGUSR1, SIGTERM and SIGINT are passed on to them, and it is they who decide when to end; a Ctrl-C, which a terminal
    sends to all, reaches them twice, and is one for them. While there are no ranks yet, nothing would be lost, and the
    process ends as if they had saved. Under SLURM, of several nodes each has the rank of its task.

    With the rendezvous that is torchrun's default, `static`, nodes do not need each other's agents to notice how their
    own ranks end; with `c10d`, an agent whose ranks still save is lost once the first node's has ended.
    """
    forwarder = _Forwarder()
    for number in FORWARDED:  # first of all, since torch takes seconds to import
        signal.signal(number, forwarder)
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    options = parse_args(list(arguments))
    if options.nnodes != "1" and options.node_rank == 0:
        options.node_rank = read_number(os.environ, "SLURM_NODEID") or 0
    # torchrun installs handlers for these when it has started the ranks; not for those that are forwarded
    options.signals_to_handle = "SIGHUP,SIGQUIT"
    try:
        run(options)
    except ChildFailedError as error:
        codes = {failure.exitcode for failure in error.failures.values()}
        # ranks that have saved end one after the other, and the agent sends SIGTERM to those that are last
        if EXIT_PREEMPTED in codes and codes <= {EXIT_PREEMPTED, -signal.SIGTERM}:
            return EXIT_PREEMPTED
        print(error, file=sys.stderr, flush=True)
        worst = next((code for code in sorted(codes) if code != EXIT_PREEMPTED), 1)
        return 128 - worst if worst < 0 else worst
    return 0


class _Forwarder:
    """Handler that passes signals on to the ranks of this node."""

    def __init__(self) -> None:
        self._started = False

    def __call__(self, number: int, _frame: object) -> None:
        # its other children, such as Python's resource tracker, would die of it
        ranks = [child for child in psutil.Process().children() if "RANK" in _environment(child)]
        self._started |= bool(ranks)
        for rank in ranks:
            rank.send_signal(number)
        if not self._started:
            raise SystemExit(EXIT_PREEMPTED)


def _environment(process: psutil.Process) -> dict[str, str]:
    try:
        return process.environ()
    except psutil.Error:
        return {}
