"""Say what a folder or file is, and what can be done with it.

    ponder inspect downloaded/llama
    ponder inspect runs/quickstart
    ponder inspect data/corpus_text_document

Knows Hugging Face models (and says whether one can be taken over, or which field stops it), exports, released
PonderLM-2 checkpoints, run folders, checkpoints, configurations, datasets and tokenizers. No weight is read.
"""

import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megatron_ponder.base.command_line import Parser
from megatron_ponder.base.counts import counted
from megatron_ponder.base.errors import UserError, command
from megatron_ponder.checkpoint.folders import CONFIG, checkpoints_in, find_checkpoint, is_hugging_face
from megatron_ponder.checkpoint.manifest import read_manifest
from megatron_ponder.checkpoint.optimizer_state import WEIGHT
from megatron_ponder.checkpoint.reader import damaged, read_config_of, tokenizer_path
from megatron_ponder.checkpoint.tensor_files import problem_of
from megatron_ponder.config import load_config
from megatron_ponder.data.dataset_manifest import read_dataset_manifest
from megatron_ponder.data.indexed_dataset import IndexedDataset, dataset_paths
from megatron_ponder.data.tokenizer import load_tokenizer
from megatron_ponder.hf.folder_summary import facts_of, summarize_folder

# Names below a folder that is none of these which are mentioned.
MENTIONED = 6


@dataclass
class Found:
    """What a path is.

    Attributes:
        kind: in words.
        facts: what there is to say of it, by headings.
        ahead: commands that take it.
    """

    kind: str
    facts: dict[str, str] = field(default_factory=dict)
    ahead: list[str] = field(default_factory=list)


@command
def main(argv: Sequence[str]) -> None:
    """Parse the command line, look, print."""
    parser = Parser("inspect", __doc__)
    parser.add_argument("paths", type=Path, nargs="+", metavar="PATH", help="a folder, a file, or a dataset's prefix")
    for path in parser.parse_args(argv).paths:
        found = find(path)
        width = max(map(len, found.facts), default=0)
        lines = [f"  {heading:<{width}}  {fact}" for heading, fact in found.facts.items()]
        print(f"{path}: {found.kind}", *lines, *(f"  > {ahead}" for ahead in found.ahead), sep="\n")


def find(path: Path) -> Found:
    """What a path is.

    Raises:
        UserError: nothing that is known here, or damaged.
    """
    for is_one, of in _KINDS:
        if is_one(path):
            return of(path)
    if not path.exists():
        raise UserError(f"{path} does not exist")
    raise UserError(f"{path} is nothing that is known here{_beginnings(path)}")


def _dataset(path: Path) -> Found:
    prefix = _prefix(path)
    indexed, manifest = IndexedDataset(prefix), read_dataset_manifest(prefix)
    facts = {"tokens": f"{indexed.num_tokens:,} in {counted(indexed.num_documents, 'document')}, {indexed.dtype.name}"}
    facts["tokenizer"] = "unknown, it has no manifest"
    if manifest is not None:
        facts["tokenizer"] = f"{manifest.tokenizer[:16]} with {manifest.vocab_size:,} tokens, {manifest.eod_id} the end"
    given = shlex.quote(str(prefix))
    return Found(
        "a dataset", facts, [f"ponder train --data.path {given} ...", f"ponder inspect-dataset {given} --verify"]
    )


def _run(path: Path) -> Found:
    config, saved = load_config(path / CONFIG), checkpoints_in(path / "checkpoints")
    facts = facts_of(config)
    facts["checkpoints"] = ", ".join(folder.name for folder in saved) or "none"
    given = shlex.quote(str(path))
    ahead = [f"ponder status {given}", f"ponder train --config {given}/{CONFIG} --checkpoint.resume auto"]
    return Found("a run", facts, ahead + (_uses(path) if saved else []))


def _checkpoint(path: Path) -> Found:
    folder = find_checkpoint(path)
    manifest = read_manifest(folder)
    for name, (size, _) in manifest.files.items():
        problem = problem_of(folder / name, size, digest=None)
        if problem is not None:
            raise damaged(folder, name, problem)
    config = read_config_of(folder)
    kinds = {key.partition("/")[0] for key in manifest.tensors}
    facts = facts_of(config)
    facts["trained"] = f"{counted(manifest.state.step, 'step')}, {counted(manifest.state.samples, 'sample')}"
    facts["holds"] = "weights alone, to start from" if kinds == {WEIGHT} else "the whole state of a run"
    if manifest.averaged:
        facts["average of"] = ", ".join(f"{share:.4f} × {of}" for of, share in manifest.averaged.items())
    source = tokenizer_path(folder)
    facts["tokenizer"] = "none" if source is None else f"{load_tokenizer(source).vocab_size:,} tokens"
    given = shlex.quote(str(path))
    return Found(
        "a checkpoint" if folder == path else f"a folder of checkpoints, of which {folder.name} counts",
        facts,
        [f"ponder inspect-checkpoint --checkpoint {given}", *_uses(path)],
    )


def _configuration(path: Path) -> Found:
    config, given = load_config(path), shlex.quote(str(path))
    ahead = [f"ponder train --config {given}", f"ponder estimate --config {given}"]
    return Found("a configuration of a run", facts_of(config) | {"run folder": config.training.run_dir}, ahead)


def _hugging_face(path: Path) -> Found:
    summary, given = summarize_folder(path), shlex.quote(str(path))
    if summary.obstacle is not None:
        return Found(summary.kind, summary.facts | {"cannot be taken over": summary.obstacle})
    ahead = [
        f"ponder train --checkpoint.initialize_from {given} --data.path PREFIX ...",
        f"ponder import-hf --model {given} --output FOLDER",
    ]
    return Found(summary.kind, summary.facts, ahead)


def _tokenizer(path: Path) -> Found:
    tokenizer, given = load_tokenizer(path), shlex.quote(str(path))
    facts = {"tokens": f"{tokenizer.vocab_size:,}, of which {tokenizer.eod_id} ends documents"}
    facts["fingerprint"] = tokenizer.fingerprint[:16]
    return Found("a tokenizer", facts, [f"ponder preprocess --tokenizer {given} --input TEXT --output-prefix PREFIX"])


def _uses(path: Path) -> list[str]:
    """Commands for the model of a checkpoint."""
    given = shlex.quote(str(path))
    return [
        f"ponder generate --checkpoint {given} --prompt TEXT",
        f"ponder export-hf --checkpoint {given} --output FOLDER",
        f"ponder train --checkpoint.initialize_from {given} --data.path PREFIX ...",
    ]


def _prefix(path: Path) -> Path:
    """The prefix of a dataset that is named by one of its files."""
    return path.with_suffix("") if path.suffix in (".bin", ".idx") else path


def _beginnings(path: Path) -> str:
    """What is below a folder, or has a file as its part, and may be meant."""
    if path.is_file():
        whole = next(
            (one for one in (path.with_suffix(""), path.parent) if any(is_one(one) for is_one, _ in _KINDS)), None
        )
        if whole is not None:
            return f" by itself, but {whole} is"
    below = sorted(path.iterdir()) if path.is_dir() else []
    known = [inside.name for inside in below if any(is_one(inside) for is_one, _ in _KINDS)]
    if not known:
        return "; Hugging Face models, runs, checkpoints, configurations, datasets and tokenizers are"
    more = f" and {len(known) - MENTIONED} more" if len(known) > MENTIONED else ""
    return f", but {', '.join(known[:MENTIONED])}{more} in it {'are' if len(known) > 1 else 'is'}"


def _is_tokenizer(path: Path) -> bool:
    if path.is_file():
        return path.suffix == ".model" or path.name == "tokenizer.json"
    return any((path / f"tokenizer.{ending}").is_file() for ending in ("model", "json"))


# What there is, the most telling first, and how it is told.
_KINDS: list[tuple[Callable[[Path], bool], Callable[[Path], Found]]] = [
    (lambda path: all(file.is_file() for file in dataset_paths(_prefix(path))), _dataset),
    (lambda path: (path / CONFIG).is_file() and find_checkpoint(path) != path, _run),
    (lambda path: path.is_dir() and find_checkpoint(path) is not None, _checkpoint),
    (lambda path: path.suffix in (".yaml", ".yml") and path.is_file(), _configuration),
    (is_hugging_face, _hugging_face),
    (_is_tokenizer, _tokenizer),
]
