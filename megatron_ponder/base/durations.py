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


def format_duration(seconds: float) -> str:
    """A length of time as hours, minutes and seconds, after days where there are any: 1:02:03, 3 days 1:02:03."""
    minutes, seconds = divmod(round(max(0.0, seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    clock = f"{hours}:{minutes:02d}:{seconds:02d}"
    return f"{days} day{'s' if days > 1 else ''} {clock}" if days else clock
