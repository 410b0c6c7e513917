"""Write the text that every machine has: the sources and docs of this Python's standard library, one document a line.

python examples/quickstart/make_corpus.py --output data/stdlib.jsonl

With --packages also the sources of the packages that are installed for this Python, twenty times as much.
"""

import argparse
import json
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path

from megatron_ponder.base.errors import command
from megatron_ponder.base.files import check_output, replacing

# Tests repeat themselves, and packages below the library are not the library.
LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


@command
def main(argv: Sequence[str]) -> None:
    """Collect every source file that is UTF-8, in a fixed order."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="the .jsonl file to write")
    parser.add_argument("--packages", action="store_true", help="also the installed packages")
    arguments = parser.parse_args(argv)
    check_output(arguments.output)
    paths = sysconfig.get_paths()
    folders = [Path(paths["stdlib"]), *([Path(paths["purelib"])] if arguments.packages else [])]
    documents, size = 0, 0
    with replacing(arguments.output) as aside, aside.open("w", encoding="utf-8") as out:
        for folder in folders:
            for path, text in _sources(folder):
                out.write(json.dumps({"text": text, "path": path}) + "\n")
                documents, size = documents + 1, size + len(text.encode())
    print(f"{documents:,} documents, {size / 1e6:.1f} MB in {arguments.output}")


def _sources(folder: Path) -> Iterator[tuple[str, str]]:
    """Path in the folder and text of every source file."""
    for path in sorted(folder.rglob("*.py")):
        name = path.relative_to(folder)
        if LEFT_OUT & set(name.parts):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError):
            continue
        if text.strip():
            yield str(name), text


if __name__ == "__main__":
    main()
