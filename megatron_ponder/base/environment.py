"""What launchers and users say in environment variables: read here, by one rule for all of them.

A variable that is empty is not set. What is set and cannot be meant is refused in one line that names it.
"""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from megatron_ponder.base.errors import UserError

# Of a number that is no port; far beyond any count of ranks, threads or jobs, and what every library can hold.
LARGEST = 2**32 - 1
LARGEST_PORT = 2**16 - 1
LARGEST_THREADS = 2**12
_OF_LAUNCHERS = (
    r"((LOCAL_|GROUP_|ROLE_|CROSS_)?(RANK|WORLD_SIZE|SIZE|NAME)$)|(MASTER|TORCHELASTIC|SLURM|OMPI|PMI|PMIX|MPI)_"
)


def read_word(environ: Mapping[str, str], name: str) -> str | None:
    """The value of a variable without the space around it; None if it is empty or not set."""
    return environ.get(name, "").strip() or None


def read_number(environ: Mapping[str, str], name: str, least: int = 0, most: int = LARGEST) -> int | None:
    """The whole number in a variable; None if it is empty or not set.

    Args:
        environ: the variables.
        name: of the one to read.
        least: the smallest number it may be.
        most: the largest.

    Raises:
        UserError: it is no such number.
    """
    word = read_word(environ, name)
    if word is None:
        return None
    # digits alone, since int() takes more than any launcher writes; no more of them than the largest number has
    if not re.fullmatch(r"[0-9]{1,10}", word) or not least <= int(word) <= most:
        raise UserError(
            f'{name} is "{word}", not a number from {least} to {most}; set it to one, or unset it{_why(word)}'
        )
    return int(word)


def read_port(environ: Mapping[str, str], name: str) -> int | None:
    """The port in a variable; None for any that is free: it is 0, empty or not set."""
    return read_number(environ, name, most=LARGEST_PORT) or None


def read_host(environ: Mapping[str, str], name: str) -> str | None:
    """The host name or address in a variable; None if it is empty or not set.

    Raises:
        UserError: it is neither.
    """
    word = read_word(environ, name)
    if word is not None and re.search(r"[\s/]", word):
        raise UserError(f'{name} is "{word}", not a host name or an address; set it to one, or unset it{_why(word)}')
    return word


def read_threads(environ: Mapping[str, str] = os.environ) -> int | None:
    """The threads of a process by OMP_NUM_THREADS, which may be a list, one number for each level of nesting."""
    first, *_ = environ.get("OMP_NUM_THREADS", "").split(",")
    return read_number({"OMP_NUM_THREADS": first}, "OMP_NUM_THREADS", 1, LARGEST_THREADS)


@contextmanager
def variables_kept() -> Iterator[None]:
    """Give all variables of this process the values back that they had, at the end of the context."""
    before = dict(os.environ)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def without_launcher(environ: Mapping[str, str]) -> dict[str, str]:
    """The variables for a process that is no rank: without all by which launchers tell ranks of themselves."""
    return {name: value for name, value in environ.items() if not re.match(_OF_LAUNCHERS, name)}


def without_local_rank(arguments: Sequence[str]) -> list[str]:
    """A command line without `--local_rank N`, which deepspeed and older launchers add to it.

    They set LOCAL_RANK as well, which is what counts; where one has not, it is set here.

    Raises:
        UserError: N is no number, or not that of LOCAL_RANK.
    """
    rest, words = [], iter(arguments)
    for word in words:
        name, equals, value = word.partition("=")
        if name not in ("--local_rank", "--local-rank"):
            rest.append(word)
            continue
        given = read_number({name: value if equals else next(words, "")}, name)
        known = read_number(os.environ, "LOCAL_RANK")
        if given is None or known not in (None, given):
            raise UserError(
                f"{name} is {'empty' if given is None else given} and LOCAL_RANK {known}; leave {name} to the launcher"
            )
        os.environ["LOCAL_RANK"] = str(given)
    return rest


def _why(word: str) -> str:
    """What has set a variable to an address, if that is known."""
    if re.match(r"(tcp|udp)://", word):
        return " (Kubernetes sets it so in the pods beside a service of that name; enableServiceLinks: false ends that)"
    return ""
