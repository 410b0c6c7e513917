"""Agreement of all ranks that they have been started alike."""

import hashlib

import torch.distributed as dist

from megatron_ponder.base.errors import UserError
from megatron_ponder.config import Config, to_yaml


def check_same(config: Config) -> None:
    """Compare the configurations of all ranks; a collective.

    Raises:
        UserError: on every rank, naming the first key that differs, and the ranks.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    world = dist.get_world_size()
    digests: list = [None] * world
    dist.all_gather_object(digests, hashlib.sha256(to_yaml(config).encode()).hexdigest())
    other = next((rank for rank in range(world) if digests[rank] != digests[0]), None)
    if other is None:
        return
    everyones: list = [None] * world
    dist.all_gather_object(everyones, config)
    key, first, differs = first_difference(everyones[0], everyones[other])
    error = UserError(
        f"ranks were started with different configurations: {key} is {first} on rank 0 and {differs} on rank {other}; "
        "start all ranks with the same file and the same overrides"
    )
    error.shared = True
    raise error


def first_difference(one: Config, other: Config) -> tuple[str, object, object]:
    """The first key in which two configurations differ, and both values."""
    return next(
        (f"{section}.{name}", value, getattr(getattr(other, section), name))
        for section, values in vars(one).items()
        for name, value in vars(values).items()
        if value != getattr(getattr(other, section), name)
    )
