"""Keys that had other names, under which what people have written goes on being read."""

from collections.abc import Collection

from megatron_ponder.base.errors import UserError

# By the name of before: that of now.
RENAMED = {
    "model.parallel_residual": "model.residual",
    "ponder.max_steps": "ponder.latent_steps",
    "ponder.jacobi_iterations": "ponder_training.jacobi_iterations",
    "ponder.gradient_passes": "ponder_training.gradient_passes",
    "ponder.router_start": "ponder_training.router_start",
    "ponder.penalty_weight": "ponder_training.penalty_weight",
    "ponder.penalty_start": "ponder_training.penalty_start",
    "ponder.penalty_end": "ponder_training.penalty_end",
    "ponder.target_steps": "ponder_training.target_latent_steps",
    "ponder.target_rate": "ponder_training.target_rate",
    "ponder.prune_start": "ponder_training.prune_start",
    "ponder.threshold": "inference.threshold",
    "ponder.router_bias": "inference.router_bias",
}
# Where values had other names too: by the value of before, that of now.
_VALUES = {
    # Families whose residual was sequential did not look at it.
    "model.parallel_residual": {"true": None, "false": "sequential"},
}


def current(key: str, value: object) -> tuple[str, object]:
    """A dotted key and its value as they are written now.

    Raises:
        UserError: for a value that the key of before did not have.
    """
    name = RENAMED.get(key, key)
    if key not in _VALUES:
        return name, value
    if str(value).lower() not in _VALUES[key]:
        raise UserError(f"{key} is {value}, not one of {', '.join(_VALUES[key])}; its name is {name} today")
    return name, _VALUES[key][str(value).lower()]


def check_names(keys: Collection[str], where: str) -> None:
    """Refuse a key that is there under both of its names.

    Args:
        keys: with their sections.
        where: they are from, for the message.
    """
    for old, new in RENAMED.items():
        if old in keys and new in keys:
            raise UserError(f"{old} and {new} {where} are one key, which is called {new} now; leave {old} out")


def notice(old: list[str]) -> str:
    """The warning of keys that are given under old names."""
    names = ", ".join(f"{key} is {RENAMED[key]}" for key in old)
    return f"keys have new names, and are still read under the old ones: {names}"
