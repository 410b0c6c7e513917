"""Lengths of time, as people write them."""

import re

from megatron_ponder.base.errors import UserError


def parse_duration(text: str | int) -> float:
    """Seconds in `minutes`, `H:MM:SS` or `D-HH:MM:SS`, as SLURM writes them.

    Raises:
        UserError: for anything else.
    """
    found = re.fullmatch(r"(\d{1,9})|(?:(\d{1,9})-)?(\d{1,9}):(\d\d):(\d\d)", str(text).strip())
    if found is None:
        raise UserError(f"training.time_limit is {text}; write minutes or H:MM:SS, such as 90 or '1:30:00'")
    alone, days, hours, minutes, seconds = (int(part or 0) for part in found.groups())
    return 86_400.0 * days + 3_600.0 * hours + 60.0 * (alone + minutes) + seconds
