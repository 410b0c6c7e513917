"""What a file of a corpus holds: as its ending says, and where that may mean several things, as its content does."""

import json
from pathlib import Path

from megatron_ponder.base.errors import UserError
from megatron_ponder.base.texts import UTF16_MARKS, require_file
from megatron_ponder.data.text_files import COMPRESSIONS, READING_FAILS, open_input, split_name

AUTO, LINES, PARQUET, TEXT = "auto", "lines", "parquet", "text"
ENDINGS = {
    ".txt": TEXT,
    ".md": TEXT,
    ".rst": TEXT,
    ".py": TEXT,
    ".jsonl": LINES,
    ".ndjson": LINES,
    ".json": LINES,  # unless it is one value over several lines, or an array
    ".parquet": PARQUET,
}
HEAD_BYTES = 1 << 20


class FormatError(UserError):
    """A file that can be no part of a corpus as it is.

    Attributes:
        kind: what to count it as where nobody has named it, such as ".csv".
    """

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


def format_of(path: Path, declared: str = AUTO) -> str:
    """`LINES`, `PARQUET` or `TEXT`.

    Endings count in any case and before any of `COMPRESSIONS`. A `.json` file is JSON lines if its content is.

    Args:
        path: of a file.
        declared: what the user says that it is.

    Raises:
        FormatError: it is no file, or nobody says what it is, or it is JSON other than one object a line.
        UserError: a package is missing that decompresses it.
    """
    try:
        require_file(path)
    except UserError as error:
        raise FormatError("pipe, socket or device", str(error)) from None
    if declared != AUTO:
        return declared
    ending = split_name(path)[0]
    if ending not in ENDINGS:
        raise FormatError(ending or "without an ending", _unknown(path, ending))
    if ending == ".json":
        _check_json(path)
    elif ENDINGS[ending] == TEXT:
        _check_text(path, ending)
    return ENDINGS[ending]


def json_layout(head: bytes) -> str:
    """How the beginning of a file has JSON: "lines", "array", "one value" over several lines, or "none".

    Lines are objects, one each. A damaged first line hides them only if the second is no object either; what else is
    damaged does not matter here.

    Args:
        head: all of the file, or so much of it that the first line ends in it, or is too long to tell.
    """
    text = head.decode("utf-8-sig", errors="replace")
    first, *others = [line.strip() for line in text.split("\n") if line.strip()][:2] or [""]
    if not first or _is_object(first):
        return "lines"
    if first.startswith("["):
        return "array"
    if not first.startswith("{"):
        return "none"
    return "lines" if not others or _is_object(others[0]) else "one value"


def _is_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _head(path: Path) -> bytes | None:
    """The beginning of a file, decompressed; None if it cannot be read, which is counted when it is."""
    try:
        with open_input(path) as file:
            return file.stream.read(HEAD_BYTES)
    except READING_FAILS:
        return None


def _check_text(path: Path, ending: str) -> None:
    head = _head(path) or b""
    lines = [line for line in head.decode("utf-8-sig", errors="replace").split("\n", 100) if line.strip()][:2]
    if len(lines) == 2 and all(map(_is_object, lines)):
        raise FormatError(
            f"{ending} with JSON lines",
            f"{path} has the ending of a text, and JSON lines in it: rename it to .jsonl, or say with --format what "
            "it is",
        )


def _check_json(path: Path) -> None:
    head = _head(path)
    if head is None:
        return
    layout = "none" if head.startswith(UTF16_MARKS) else json_layout(head)
    if layout == "array":
        raise FormatError(
            ".json with an array",
            f"{path} is one JSON array, and JSON lines are read; write its elements one a line, as "
            "jq -c '.[]' does, to a .jsonl file",
        )
    if layout == "one value":
        raise FormatError(
            ".json over several lines",
            f"{path} has a JSON object over several lines, and JSON lines are read; write each object on a line, as "
            "jq -c . does, to a .jsonl file",
        )
    if layout == "none":
        raise FormatError(
            ".json without objects",
            f"{path} does not begin with a JSON object; give JSON lines, or say with --format text that it is text",
        )


def _unknown(path: Path, ending: str) -> str:
    if ending in (".csv", ".tsv"):
        return (
            f"{path} is a table, and which of its columns is text is not read from such; write it as Parquet or as "
            "JSON lines; with --format text each such file is one document as it is"
        )
    known = ", ".join(ENDINGS)
    return (
        f"{path} has no ending that says what it is ({known}, each also with {', '.join(COMPRESSIONS)}): rename it, "
        "or say it with --format text, lines or parquet"
    )
