"""The runs of the comparison: what is trained, as commands that a user would type, several at a time."""

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from megatron_ponder.base.errors import UserError
from megatron_ponder.checkpoint.folders import checkpoint_name, latest_checkpoint
from megatron_ponder.config import read_config

HERE = Path(__file__).parent
REPOSITORY = HERE.parents[1]
SIZES = {size: HERE / f"{size}.yaml" for size in ("cpu", "gpu", "paper", "depths", "permutations")}
SIZES["diagnostic"] = REPOSITORY / "examples" / "diagnostic" / "diagnostic.yaml"
COMPARISONS = {what: HERE / f"{what}.yaml" for what in ("variants", "costs")}
# Of the sizes whose corpus is made here: words of the tokenizer, and what more than the standard library is read.
VOCABULARY = {"cpu": 512, "gpu": 8192}
CORPUS = {"cpu": (), "gpu": ("--packages",)}
# Of those whose text is of known difficulty: what examples/diagnostic/make_corpus.py is to make.
_CHAINS = ("--kinds", "follow", "--documents", "150000", "--questions", "1", "--max-depth")
DIAGNOSTIC = {
    "diagnostic": (*_CHAINS, "2"),
    "depths": (*_CHAINS, "4"),
    "permutations": ("--kinds", "compose", "--documents", "60000", "--questions", "16", "--max-depth", "4"),
}


@dataclass(frozen=True)
class Run:
    """One training run.

    Attributes:
        variant: what it shows, a name of `variants.yaml`.
        seed: of weights and data order.
        arguments: of `ponder train`.
        folder: of the run.
    """

    variant: str
    seed: int
    arguments: tuple[str, ...]
    folder: Path

    @property
    def finished(self) -> bool:
        """Whether its last checkpoint is there."""
        latest = latest_checkpoint(self.folder / "checkpoints")
        return latest is not None and latest.name == checkpoint_name(read_config(self.arguments).training.steps)


def plan_runs(size: str, output: Path, data: Path, seeds: Sequence[int], what: str = "variants") -> list[Run]:
    """All runs, the first seed of every variant first, so that a comparison can be made as early as possible.

    Args:
        size: of `SIZES`.
        output: folder for what is made.
        data: folder of corpus and tokenizer.
        seeds: of weights and data order.
        what: of `COMPARISONS`.

    Raises:
        UserError: that comparison has nothing of that size.
    """
    chosen = yaml.safe_load(COMPARISONS[what].read_text(encoding="utf-8"))
    own = chosen.get(size, chosen.get("text"))
    if own is None:
        raise UserError(f"{COMPARISONS[what].name} has no variants of size {size}; it has {', '.join(chosen)}")
    variants = {name: values for name, values in (chosen.get("all", {}) | own).items() if values is not None}
    tokenizer = data / ("tokenizer.json" if size in DIAGNOSTIC else "tokenizer.model")
    common = ("--config", str(SIZES[size]), "--checkpoint.resume", "auto")
    common += ("--data.path", str(data / "corpus_text_document"), "--tokenizer.path", str(tokenizer))
    runs = []
    for seed in seeds:
        for variant, overrides in variants.items():
            folder = output / "runs" / f"{variant}-seed{seed}"
            own = [word for key, value in overrides.items() for word in (f"--{key}", str(value))]
            place = ("--training.seed", str(seed), "--training.run_dir", str(folder))
            runs.append(Run(variant, seed, (*common, *own, *place), folder))
    return runs


def prepare_data(size: str, folder: Path) -> None:
    """Make corpus, tokenizer and dataset unless they are there."""
    if (folder / "corpus_text_document.idx").exists():
        return
    if size in DIAGNOSTIC:
        _command("examples/diagnostic/make_corpus.py", "--output", str(folder), *DIAGNOSTIC[size])
        _preprocess(folder / "diagnostic.jsonl", folder / "tokenizer.json", folder)
        return
    if size not in VOCABULARY:
        raise UserError(f"{folder} has no corpus_text_document.idx; a corpus for size {size} is yours to make")
    folder.mkdir(parents=True, exist_ok=True)
    text = str(folder / "corpus.jsonl")
    _command("examples/quickstart/make_corpus.py", "--output", text, *CORPUS[size])
    tokenizer = ("--output-prefix", str(folder / "tokenizer"), "--vocab-size", str(VOCABULARY[size]))
    _command("-m", "megatron_ponder", "train-tokenizer", "--input", text, *tokenizer)
    _preprocess(Path(text), folder / "tokenizer.model", folder)


def _preprocess(text: Path, tokenizer: Path, folder: Path) -> None:
    words = ("--input", str(text), "--output-prefix", str(folder / "corpus"), "--tokenizer", str(tokenizer))
    _command("-m", "megatron_ponder", "preprocess", *words, "--append-eod")


def _command(*words: str) -> None:
    if subprocess.run([sys.executable, *words], cwd=REPOSITORY, check=False).returncode:
        raise UserError(f"python {' '.join(words)} failed; see above")


def train(runs: Sequence[Run], jobs: int) -> None:
    """Train what is not finished.

    Raises:
        UserError: naming the log of the first run that fails; the others are finished first.
    """
    commands = {}
    for run in runs:
        if not run.finished:
            run.folder.mkdir(parents=True, exist_ok=True)
            commands[run.folder] = ("train", *run.arguments)
    _run_all(commands, jobs, "training")


def analyse(parts: Mapping[Path, Sequence[Run]], data: Path, samples: int, jobs: int) -> None:
    """Measure the runs of each folder on the same validation samples, unless that was done after they had ended.

    By true depth too, if the folder of the data holds the depths.

    Raises:
        UserError: as `train`.
    """
    commands = {}
    depths = ("--depths", str(data / "depths")) if (data / "depths.idx").exists() else ()
    for folder, runs in parts.items():
        folder.mkdir(parents=True, exist_ok=True)
        done, checkpoints = folder / "analysis.json", [str(run.folder) for run in runs]
        newest = max((run.folder / "checkpoints").stat().st_mtime for run in runs)
        if not done.exists() or done.stat().st_mtime < newest:
            options = ("--output", str(folder), "--samples", str(samples), *depths)
            options += ("--device", "cuda") if torch.cuda.is_available() else ()
            commands[folder] = ("analyze", "--checkpoint", *checkpoints, *options)
    _run_all(commands, jobs, "analysis")


def _run_all(commands: Mapping[Path, Sequence[str]], jobs: int, title: str) -> None:
    """Run commands of the package, each with its output in console.log of the folder that it fills."""
    columns = (TextColumn(title), BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"))
    failed = []
    with ThreadPoolExecutor(jobs) as pool, Progress(*columns, TimeElapsedColumn()) as progress:
        task = progress.add_task("", total=len(commands))
        futures = {pool.submit(_run, folder, words): folder for folder, words in commands.items()}
        for future in as_completed(futures):
            folder = futures[future]
            progress.update(task, advance=1, description=folder.name)
            if future.result():
                failed.append(folder)
    if failed:
        raise UserError(f"{len(failed)} of {len(commands)} failed; see {failed[0] / 'console.log'}")


def _run(folder: Path, words: Sequence[str]) -> int:
    environment = {"OMP_NUM_THREADS": "1"} | os.environ
    with (folder / "console.log").open("a", encoding="utf-8") as log:
        command = [sys.executable, "-m", "megatron_ponder", *words]
        return subprocess.run(command, stdout=log, stderr=log, env=environment, check=False).returncode
