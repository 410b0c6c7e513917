"""Write the text that every machine has: the sources and docs of this Python's standard library, one document a line.

python examples/quickstart/make_corpus.py --output data/stdlib.jsonl
"""

import argparse
import json
import sysconfig
from pathlib import Path

from megatron_ponder.errors import command

# Tests are half of the library and repeat themselves; the rest is not the library.
LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


@command
def main() -> None:
    """Collect every source file that is UTF-8, in a fixed order."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="the .jsonl file to write")
    output = parser.parse_args().output
    output.parent.mkdir(parents=True, exist_ok=True)
    library = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(path for path in library.rglob("*.py") if not LEFT_OUT & set(path.relative_to(library).parts))
    documents, size = 0, 0
    with output.open("w", encoding="utf-8") as out:
        for path in files:
            try:
                text = path.read_text(encoding="utf-8")
            except UnicodeDecodeError:
                continue
            if text.strip():
                out.write(json.dumps({"text": text, "path": str(path.relative_to(library))}) + "\n")
                documents, size = documents + 1, size + len(text.encode())
    print(f"{documents} documents, {size / 1e6:.1f} MB in {output}")


if __name__ == "__main__":
    main()
