"""Evaluate a checkpoint on its validation split or on a text file.

    python tools/evaluate.py --checkpoint runs/quickstart
    python tools/evaluate.py --checkpoint runs/quickstart --text README.md --threshold 0.3

Every row says which rule (soft mask or hard pruning) and which evaluation (jacobi(R), or exact, which equals sequential
decoding) it is about.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from megatron_ponder.checkpoint.load import LoadedModel, load_model
from megatron_ponder.data.loader import validation_batches
from megatron_ponder.data.manifest import check_vocabulary
from megatron_ponder.data.mixture import open_mixture, prefixes
from megatron_ponder.errors import UserError, command
from megatron_ponder.evaluation.perplexity import Evaluation, evaluate, settings, windows
from megatron_ponder.launch import prepare_cpu


@command
def main() -> None:
    """Parse the command line, evaluate, print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True, help="run folder or checkpoint folder")
    parser.add_argument("--text", type=Path, help="a UTF-8 text file to evaluate on, in place of the split")
    parser.add_argument("--data", help="dataset prefix; that of the training run unless given")
    parser.add_argument("--split", default="valid", choices=["train", "valid", "test"])
    parser.add_argument("--samples", type=int, default=64, help="samples of the split (default: 64)")
    parser.add_argument("--refinements", type=int, nargs="*", help="R of jacobi(R); default: 0 and the largest trained")
    parser.add_argument("--threshold", type=float, help="τ; the trained model's unless given")
    parser.add_argument("--router-bias", type=float, help="α; the trained model's unless given")
    parser.add_argument("--output", type=Path, help="also write the figures as JSON to this file")
    arguments = parser.parse_args()

    prepare_cpu()
    loaded = load_model(arguments.checkpoint)
    batches = _text(loaded, arguments.text) if arguments.text else _split(loaded, arguments)
    refinements = arguments.refinements
    if refinements is None:
        refinements = sorted({0, loaded.config.ponder.evaluation_refinements})
    ways = settings(loaded.model, arguments.threshold, arguments.router_bias, refinements)
    console = Console(width=None if sys.stdout.isatty() else 110)
    progress = track(ways, "evaluating", console=console, disable=not console.is_terminal, transient=True)
    results = [evaluate(loaded.model, batches, way, _byte_counter(loaded)) for way in progress]
    console.print(_table(results, loaded))
    if arguments.output:
        content = {"checkpoint": loaded.folder.name, "evaluations": [result.as_dict() for result in results]}
        arguments.output.write_text(json.dumps(content, indent=1), encoding="utf-8")


def _text(loaded: LoadedModel, path: Path) -> list[Tensor]:
    if loaded.tokenizer is None:
        raise UserError(f"{loaded.folder} has no tokenizer to read {path} with; evaluate on a dataset with --data")
    try:
        tokens = loaded.tokenizer.encode(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start})") from error
    return list(windows([loaded.tokenizer.eod_id, *tokens], loaded.config.data.sequence_length))


def _split(loaded: LoadedModel, arguments: argparse.Namespace) -> list[Tensor]:
    data = loaded.config.data
    if arguments.data:
        data = replace(data, path=arguments.data, valid_path=None, test_path=None, phases=[])
    if not data.path:
        raise UserError(f"{loaded.folder} names no dataset; evaluate on one with --data, or on a file with --text")
    datasets = open_mixture(replace(data, cache_path=None), loaded.config.training.seed).samples
    for prefix in prefixes(data):
        check_vocabulary(prefix, loaded.config.model.vocab_size)
    if arguments.split not in datasets:
        raise UserError(f'data.split "{data.split}" has no {arguments.split} part; choose another --split, or --text')
    dataset = datasets[arguments.split]
    count = min(arguments.samples, dataset.samples_per_epoch)
    return list(validation_batches(dataset, count, loaded.config.training.micro_batch_size, 0, 1))


def _byte_counter(loaded: LoadedModel):
    if loaded.tokenizer is None:
        return None

    def count(ids: Sequence[int]) -> int:
        return len(loaded.tokenizer.decode(ids).encode("utf-8"))

    return count


def _table(results: list[Evaluation], loaded: LoadedModel) -> Table:
    ponder = loaded.config.ponder
    table = Table(title=f"{loaded.folder.name}: {ponder.mode}, {results[0].tokens:,} tokens")
    table.add_column("rule, evaluation", no_wrap=True)
    for heading in ("loss", "perplexity", "bits/byte", "steps", "share at 0..K", "KV", "MFLOPs"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.caption = "steps, KV entries and FLOPs are per token"
    for result in results:
        table.add_row(
            result.setting,
            f"{result.cross_entropy:.4f}",
            f"{result.perplexity:.2f}",
            "–" if result.bits_per_byte is None else f"{result.bits_per_byte:.4f}",
            f"{result.mean_steps:.3f}",
            " ".join(f"{share:.1%}" for share in result.step_shares),
            f"{result.kv_entries:.3f}",
            f"{result.flops / 1e6:.2f}",
        )
    return table


if __name__ == "__main__":
    main()
