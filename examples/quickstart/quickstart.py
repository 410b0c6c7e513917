"""From raw text to an exported PonderLM-3 that generates, by the commands that a user would type.

    python examples/quickstart/quickstart.py [--folder runs/quickstart]

Each step prints its command before it runs it. At the end the export has generated the same text as the training
checkpoint, or this fails.
"""

import argparse
import json
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console

from megatron_ponder.errors import UserError, command

REPOSITORY = Path(__file__).parents[2]
PROMPT = "def main(argv):\n    "
NEW_TOKENS = 40


class Steps:
    """Runs commands from the repository's folder, timing each."""

    def __init__(self) -> None:
        self._console = Console(highlight=False, soft_wrap=True)
        self._started = time.perf_counter()

    def say(self, text: str) -> None:
        """Print a line of our own."""
        self._console.print(text, markup=False)

    def run(self, title: str, script: str, *arguments: str | Path, capture: bool = False) -> str:
        """Run one of the repository's commands.

        Returns:
            What it printed, with `capture`; else it prints as it goes.

        Raises:
            UserError: if it fails.
        """
        words = [script, *map(str, arguments)]
        self._console.rule(f"[bold]{title}")
        self._console.print(f"$ python {shlex.join(words)}", style="cyan", markup=False)
        begun = time.perf_counter()
        pipe = subprocess.PIPE if capture else None
        done = subprocess.run([sys.executable, *words], cwd=REPOSITORY, stdout=pipe, text=True, check=False)
        if done.returncode:
            raise UserError(f"`python {shlex.join(words)}` failed with exit code {done.returncode}; see above")
        now = time.perf_counter()
        self._console.print(f"{now - begun:.1f} s, {now - self._started:.1f} s in all", style="dim")
        return done.stdout or ""


@command
def main() -> None:
    """Run every step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/quickstart"), help="for everything that is made")
    folder = (REPOSITORY / parser.parse_args().folder).resolve()
    if folder.exists():
        shutil.rmtree(folder)
    corpus, tokenizer, dataset = folder / "stdlib.jsonl", folder / "tokenizer", folder / "stdlib"
    run, export = folder / "run", folder / "export"
    steps = Steps()
    steps.run("1. text", "examples/quickstart/make_corpus.py", "--output", corpus)
    steps.run(
        "2. tokenizer",
        "tools/train_tokenizer.py",
        "--input",
        corpus,
        "--output-prefix",
        tokenizer,
        "--vocab-size",
        "2048",
    )
    steps.run(
        "3. indexed dataset", "tools/preprocess_data.py", "--input", corpus, "--output-prefix", dataset,
        "--tokenizer", f"{tokenizer}.model", "--workers", "2", "--append-eod",
    )  # fmt: skip
    steps.run(
        "4. pretraining", "pretrain_ponder.py", "--config", "examples/quickstart/adaptive.yaml",
        "--data.path", f"{dataset}_text_document", "--tokenizer.path", f"{tokenizer}.model", "--training.run_dir", run,
    )  # fmt: skip
    steps.run("5. evaluation", "tools/evaluate.py", "--checkpoint", run, "--output", folder / "evaluation.json")
    generation = ["--checkpoint", run, "--prompt", PROMPT, "--max-new-tokens", str(NEW_TOKENS)]
    steps.run("6. generation", "tools/generate.py", *generation)
    trained = json.loads(steps.run("   the same as JSON", "tools/generate.py", *generation, "--json", capture=True))
    steps.run("7. export", "tools/convert_to_hf.py", "--checkpoint", run, "--output", export)
    loaded = steps.run(
        "8. the export in transformers", "examples/quickstart/use_export.py", "--model", export,
        "--prompt", PROMPT, "--max-new-tokens", str(NEW_TOKENS), capture=True,
    )  # fmt: skip
    exported = json.loads(loaded)
    if exported["tokens"] != trained["tokens"]:
        raise UserError("the export generates another text than the checkpoint; please report this as a bug")
    steps.say(f"AutoModelForCausalLM generates the same {len(exported['tokens'])} tokens:\n{PROMPT}{exported['text']}")
    steps.say(f"everything is in {folder}; the loss plot is {run / 'training.png'}")


if __name__ == "__main__":
    main()
