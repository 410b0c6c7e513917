"""Keys under the names that they had before, in configurations and checkpoints that are older."""

from megatron_ponder.base.errors import UserError

# Today's key, and today's value for each that it had.
FORMER = {
    # Families whose residual was sequential did not look at it.
    "model.parallel_residual": ("model.residual", {"true": None, "false": "sequential"}),
}


def current(key: str, value: object) -> tuple[str, object]:
    """A dotted key and its value as they are written today.

    Raises:
        UserError: for a value that the former key did not have.
    """
    if key not in FORMER:
        return key, value
    name, values = FORMER[key]
    if str(value).lower() not in values:
        raise UserError(f"{key} is {value}, not one of {', '.join(values)}; its name is {name} today")
    return name, values[str(value).lower()]
