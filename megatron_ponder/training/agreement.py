"""Agreement of all ranks that they have been started alike."""

import hashlib

from megatron_ponder.base.errors import UserError
from megatron_ponder.config import Config, to_yaml
from megatron_ponder.parallel.collectives import from_all


def check_same(config: Config) -> None:
    """Compare the configurations of all ranks; a collective.

    Raises:
        UserError: on every rank, naming the first key that differs, and the ranks.
    """
    digests = from_all(hashlib.sha256(to_yaml(config).encode()).hexdigest())
    other = next((rank for rank, digest in enumerate(digests) if digest != digests[0]), None)
    if other is None:
        return
    everyones = from_all(config)
    key, first, differs = first_difference(everyones[0], everyones[other])
    raise UserError(
        f"ranks were started with different configurations: {key} is {first} on rank 0 and {differs} on rank {other}; "
        "start all ranks with the same file and the same overrides",
        shared=True,
    )


def first_difference(one: Config, other: Config) -> tuple[str, object, object]:
    """The first key in which two configurations differ, and both values."""
    return next(
        (f"{section}.{name}", value, getattr(getattr(other, section), name))
        for section, values in vars(one).items()
        for name, value in vars(values).items()
        if value != getattr(getattr(other, section), name)
    )
