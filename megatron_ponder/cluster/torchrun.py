"""torchrun for jobs that are told to save: signals reach the ranks, and their exit code is its own.

torchrun itself dies of SIGUSR1, answers SIGTERM by ending its ranks after half a minute, and ends with 1 whatever their
code was, so that a script cannot tell a run that has saved and wants to go on from one that has failed.
"""

import signal
import sys
from collections.abc import Sequence

import psutil

from megatron_ponder.errors import EXIT_PREEMPTED

FORWARDED = (signal.SIGUSR1, signal.SIGTERM)


def torchrun(arguments: Sequence[str]) -> int:
    """Do what torchrun does with these arguments, and return the exit code of the ranks of this node.

    SIGUSR1 and SIGTERM are passed on to them, and it is they who decide when to end.
    """
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    options = parse_args(list(arguments))
    # torchrun installs handlers for these when it has started the ranks; not for those that are forwarded
    options.signals_to_handle = "SIGINT,SIGHUP,SIGQUIT"
    for number in FORWARDED:
        signal.signal(number, _forward)
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


def _forward(number: int, _frame: object) -> None:
    for child in psutil.Process().children():
        # its other children, such as Python's resource tracker, would die of it
        if "RANK" in _environment(child):
            child.send_signal(number)


def _environment(process: psutil.Process) -> dict[str, str]:
    try:
        return process.environ()
    except psutil.Error:
        return {}
