"""Files of one JSON object a line, as a run appends them."""

import json


def records_in(lines: bytes) -> list[dict]:
    """The objects of a file's lines, in order; lines that a crash has cut off hold none."""
    records = []
    for line in lines.splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict):
            records.append(record)
    return records
