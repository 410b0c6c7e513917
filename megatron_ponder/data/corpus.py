"""Documents from text files, folders of them, and JSON Lines."""

import glob
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from megatron_ponder.errors import UserError

SUFFIXES = (".txt", ".md", ".rst", ".py", ".jsonl")


def iterate_documents(inputs: Sequence[str | Path], key: str, skipped: Counter[str]) -> Iterator[str]:
    """All documents in a fixed order: one per line of a `.jsonl` file, one per other file.

    Args:
        inputs: files, folders (searched for `SUFFIXES`, sorted) and glob patterns.
        key: field of a JSON line that holds the text.
        skipped: counts what could not be used, by reason, as the iteration goes on.

    Raises:
        UserError: an input does not exist, or there is not one usable document in all of them.
    """
    found = False
    for path in find_files(inputs):
        try:
            documents = _lines(path, key, skipped) if path.suffix == ".jsonl" else _whole(path, skipped)
            for text in documents:
                if text:
                    found = True
                    yield text
                else:
                    skipped["empty document"] += 1
        except OSError:
            skipped["unreadable file"] += 1
    if not found:
        reasons = f" (skipped: {describe_skipped(skipped)})" if skipped else ""
        names = ", ".join(SUFFIXES)
        raise UserError(f"no documents in the input{reasons}: give UTF-8 text ({names}), or another --key for .jsonl")


def find_files(inputs: Sequence[str | Path]) -> list[Path]:
    """The files that `iterate_documents` reads, each once, in its order.

    Raises:
        UserError: an input does not exist or matches nothing.
    """
    files: dict[Path, None] = {}
    for name in inputs:
        path = Path(name)
        if path.is_file():
            found = [path]
        elif path.is_dir():
            found = _in_folder(path)
        else:
            matches = [Path(match) for match in sorted(glob.glob(str(name), recursive=True))]
            found = [file for match in matches for file in (_in_folder(match) if match.is_dir() else [match])]
            if not matches:
                raise UserError(f"{name} does not exist and matches no file: check --input")
        files.update(dict.fromkeys(found))
    return list(files)


def describe_skipped(skipped: Counter[str]) -> str:
    """For example "3 × empty document, 1 × not UTF-8"."""
    return ", ".join(f"{count} × {reason}" for reason, count in sorted(skipped.items()))


def _in_folder(folder: Path) -> list[Path]:
    files = (path for path in folder.rglob("*") if path.suffix in SUFFIXES and path.is_file())
    return sorted(files, key=lambda path: path.as_posix())


def _whole(path: Path, skipped: Counter[str]) -> Iterator[str]:
    try:
        # Bytes, because text mode would turn "\r\n" into "\n".
        yield path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError:
        skipped["not UTF-8"] += 1


def _lines(path: Path, key: str, skipped: Counter[str]) -> Iterator[str]:
    with open(path, "rb") as file:
        for number, line in enumerate(file):
            if not line.strip():
                continue
            try:
                record = json.loads(line.decode("utf-8-sig" if number == 0 else "utf-8"))
                text = record[key]
                text.encode("utf-8")
            except UnicodeDecodeError:
                skipped["not UTF-8"] += 1
            except UnicodeEncodeError:
                skipped["half a surrogate pair"] += 1
            except (ValueError, RecursionError):
                skipped["malformed JSON"] += 1
            except (KeyError, TypeError, AttributeError, IndexError):
                skipped[f"no text in {key!r}"] += 1
            else:
                yield text
