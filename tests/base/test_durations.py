"""Lengths of time, read and written."""

import pytest

from megatron_ponder.base.durations import format_duration, parse_duration
from megatron_ponder.base.errors import UserError


@pytest.mark.parametrize(
    ("text", "seconds"), [("90", 5400), ("1:30:00", 5400), ("0:00:05", 5), ("2-01:00:30", 2 * 86400 + 3630)]
)
def test_durations(text, seconds):
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "1:30", "an hour", "-5", "1:2:3"])
def test_other_durations_are_refused(text):
    with pytest.raises(UserError, match="write minutes or H:MM:SS, such as 90"):
        parse_duration(text)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(-1, "0:00:00"), (59.6, "0:01:00"), (3723, "1:02:03"), (90_000, "1 day 1:00:00"), (3 * 86400, "3 days 0:00:00")],
)
def test_how_they_are_written(seconds, text):
    assert format_duration(seconds) == text
