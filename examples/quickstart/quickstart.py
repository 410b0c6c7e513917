"""From raw text to an exported PonderLM-3 that generates, by the commands of the README.

    python examples/quickstart/quickstart.py [--folder FOLDER]

Each step prints its command before it runs it. At the end the export has generated the same text as the training
checkpoint, or this fails.

What an earlier quickstart has made is replaced. Anything else that lies in its way is left as it is, and named.
"""

import argparse
import json
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console

from megatron_ponder.base.errors import UserError, command
from megatron_ponder.base.files import make_folder, write_atomically

REPOSITORY = Path(__file__).resolve().parents[2]
COMMANDS = {
    "text": "python examples/quickstart/make_corpus.py --output data/stdlib.jsonl",
    "tokenizer": "ponder train-tokenizer --input data/stdlib.jsonl --output-prefix data/tokenizer --vocab-size 2048",
    "dataset": "ponder preprocess --input data/stdlib.jsonl --output-prefix data/stdlib "
    "--tokenizer data/tokenizer.model --workers 2 --append-eod",
    "training": "ponder train --config examples/quickstart/adaptive.yaml",
    "evaluation": "ponder evaluate --checkpoint runs/quickstart --samples 16",
    "generation": "ponder generate --checkpoint runs/quickstart --prompt 'def main(argv):' --max-new-tokens 8",
    "export": "ponder export-hf --checkpoint runs/quickstart --output runs/export",
    "use": "python examples/quickstart/use_export.py --model runs/export --prompt 'def main(argv):' --max-new-tokens 8",
}
PROGRAMS = {"python": [sys.executable], "ponder": [sys.executable, "-m", "megatron_ponder"]}
# What these commands write, files and folders, and where it is noted in which state they have left it.
MADE = (
    "data/stdlib.jsonl", "data/tokenizer.model", "data/tokenizer.vocab", "data/stdlib_text_document.bin",
    "data/stdlib_text_document.idx", "data/stdlib_text_document.json", "runs/quickstart", "runs/export",
)  # fmt: skip
NOTE = "runs/quickstart.json"


class Made:
    """What the quickstart has made in a folder, told from what others have put there or changed."""

    def __init__(self, folder: Path) -> None:
        """Look into a folder, which need not exist."""
        self._folder, self._note = folder, folder / NOTE

    def remove(self) -> list[str]:
        """Delete what an earlier quickstart has made.

        Returns:
            The paths that were deleted, below the folder.

        Raises:
            UserError: something in the way is not from a quickstart, or has changed since; then nothing is deleted.
        """
        known = json.loads(self._note.read_text(encoding="utf-8")) if self._note.is_file() else {}
        for name, state in self._states().items():
            if known.get(name) != state:
                raise UserError(
                    f"{self._folder / name} is in the way, and is not as a quickstart has left it: move it to another "
                    "place, or have everything made in another one by --folder FOLDER"
                )
        there = [name for name in MADE if (self._folder / name).exists()]
        for path in (self._folder / name for name in there):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        return there

    @contextmanager
    def noted(self) -> Iterator[None]:
        """Note what there is once the block has ended, however it has."""
        try:
            yield
        finally:
            make_folder(self._note.parent)
            write_atomically(self._note, json.dumps(self._states(), indent=1) + "\n")

    def _states(self) -> dict[str, list[int]]:
        """Size and time of change of every file that is, or lies below, one of `MADE`."""
        tops = [self._folder / name for name in MADE]
        files = [file for top in tops for file in (top, *top.rglob("*")) if file.is_file() or file.is_symlink()]
        states = ((file, file.lstat()) for file in files)
        return {file.relative_to(self._folder).as_posix(): [state.st_size, state.st_mtime_ns] for file, state in states}


class Steps:
    """Runs commands of the repository, timing each."""

    def __init__(self, folder: Path) -> None:
        """Begin in the folder below which the commands read and write."""
        self._folder = folder
        self._console = Console(highlight=False, soft_wrap=True)
        self._started = time.perf_counter()

    def say(self, text: str) -> None:
        """Print a line of our own."""
        self._console.print(text, markup=False)

    def run(self, title: str, line: str, capture: bool = False) -> str:
        """Run one command.

        Args:
            title: to print above it.
            line: as it is typed in the repository.
            capture: return what it prints, which otherwise appears as it comes.

        Raises:
            UserError: if it fails.
        """
        words = [self._found(word) for word in shlex.split(line)]
        self._console.rule(f"[bold]{title}")
        self._console.print(f"$ {shlex.join(words)}", style="cyan", markup=False)
        begun = time.perf_counter()
        pipe = subprocess.PIPE if capture else None
        done = subprocess.run([*PROGRAMS[words[0]], *words[1:]], cwd=self._folder, stdout=pipe, text=True, check=False)
        if done.returncode:
            raise UserError(f"`{shlex.join(words)}` failed with exit code {done.returncode}; see above")
        now = time.perf_counter()
        self._console.print(f"{now - begun:.1f} s, {now - self._started:.1f} s in all", style="dim")
        return done.stdout or ""

    def _found(self, word: str) -> str:
        """A file of the repository as it is named from the folder, any other word as it is."""
        ours = self._folder != REPOSITORY and word.endswith((".py", ".yaml"))
        return str(REPOSITORY / word) if ours else word


@command
def main(argv: Sequence[str]) -> None:
    """Run every step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--folder", type=Path, default=REPOSITORY, help="for data and runs; the repository unless given"
    )
    folder = parser.parse_args(argv).folder.expanduser().resolve()
    make_folder(folder)
    steps, made = Steps(folder), Made(folder)
    replaced = made.remove()
    if replaced:
        steps.say(f"replacing what an earlier quickstart has made in {folder}: {', '.join(replaced)}")
    for number, (title, line) in enumerate(COMMANDS.items(), start=1):
        with made.noted():
            steps.run(f"{number}. {title}", line)
    trained, exported = (
        json.loads(steps.run(f"   {title} once more, as JSON", line, capture=True))["tokens"]
        for title, line in (("generation", f"{COMMANDS['generation']} --json"), ("use", COMMANDS["use"]))
    )
    if exported != trained:
        raise UserError("the export generates another text than the checkpoint; please report this as a bug")
    steps.say(f"AutoModelForCausalLM generates the same {len(exported)} tokens as the checkpoint")
    steps.say(f"everything is in data and runs of {folder}; the loss plot is runs/quickstart/training.png")


if __name__ == "__main__":
    main()
