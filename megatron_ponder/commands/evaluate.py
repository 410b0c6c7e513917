"""Evaluate a checkpoint on its validation split, a text file, or tasks of lm-evaluation-harness.

    ponder evaluate --checkpoint runs/quickstart
    ponder evaluate --checkpoint runs/quickstart --text README.md --threshold 0.3
    ponder evaluate --checkpoint runs/quickstart --tasks stdlib_next_line --tasks-path examples/evaluation

Every row says which rule (`soft` or `hard`) and which evaluation (jacobi(R), or exact, which equals sequential
decoding) it is about.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

from rich.console import Console
from rich.progress import track
from rich.table import Table

from megatron_ponder.base.command_line import Parser
from megatron_ponder.base.errors import UserError, command
from megatron_ponder.base.files import check_output, write_atomically
from megatron_ponder.base.launch import one_process
from megatron_ponder.base.paths import expand_user
from megatron_ponder.checkpoint.load import LoadedModel, load_model
from megatron_ponder.config.command_options import Number, add_options
from megatron_ponder.config.declarations import STEPS, Range
from megatron_ponder.evaluation.perplexity import Evaluation, evaluate, settings
from megatron_ponder.evaluation.sources import SPLIT_HELP, split_batches, text_batches
from megatron_ponder.generation.loading import Setup
from megatron_ponder.model.exits import Exit
from megatron_ponder.parallel.cpu_settings import prepare_cpu


@command
@one_process
def main(argv: Sequence[str]) -> None:
    """Parse the command line, evaluate, print a table."""
    parser = Parser("evaluate", __doc__)
    parser.add_argument("--checkpoint", type=Path, help="run folder or checkpoint folder")
    add_options(parser, Setup, "threshold", "router_bias", "confidence_exit")
    parser.add_argument("--output", type=Path, help="also write the figures as JSON to this file")
    text = parser.add_argument_group("on text")
    text.add_argument("--text", type=Path, help="a UTF-8 text file to evaluate on, in place of the split")
    text.add_argument("--data", type=expand_user, help="dataset prefix; that of the training run unless given")
    text.add_argument("--split", default="valid", help=SPLIT_HELP)
    text.add_argument(
        "--samples", type=Number("samples", int, Range(1, STEPS)), default=64, help="samples of the split (default: 64)"
    )
    text.add_argument(
        "--refinements",
        type=Number("refinements", int, Range(0, 1000)),
        nargs="*",
        help="R of jacobi(R); default: 0 and the largest trained",
    )
    tasks = parser.add_argument_group("on tasks, in place of text")
    tasks.add_argument("--tasks", nargs="+", help="names of tasks, groups or patterns of lm-evaluation-harness")
    tasks.add_argument("--tasks-path", type=Path, help="folder with task files of your own")
    tasks.add_argument("--prepare", action="store_true", help="find the tasks and fetch their data, and end")
    tasks.add_argument("--export", type=Path, help="an export to evaluate, in place of a checkpoint")
    tasks.add_argument(
        "--limit", type=Number("limit", int, Range(1, STEPS)), help="documents of each task; all unless given"
    )
    tasks.add_argument(
        "--num-fewshot",
        type=Number("num_fewshot", int, Range(0, 10**6)),
        help="solved examples before a question; the task's unless given",
    )
    tasks.add_argument(
        "--batch-size",
        type=Number("batch_size", int, Range(1, 10**6)),
        default=8,
        help="sequences in a forward (default: 8)",
    )
    arguments = parser.parse_args(argv)

    if arguments.output:
        check_output(arguments.output)
    if arguments.prepare:
        _prepare(arguments)
        return
    prepare_cpu()
    console = Console(width=None if sys.stdout.isatty() else 110)
    table, content = (_on_tasks if arguments.tasks else _on_text)(arguments, console)
    console.print(table)
    if arguments.output:
        write_atomically(arguments.output, json.dumps(content, indent=1))


def _on_text(arguments: argparse.Namespace, console: Console) -> tuple[Table, dict]:
    if not arguments.checkpoint:
        raise UserError("there is nothing to evaluate; give a --checkpoint, or an --export with --tasks")
    for_tasks = (arguments.export, arguments.tasks_path, arguments.limit, arguments.num_fewshot)
    if any(given is not None for given in for_tasks):
        raise UserError("--export, --tasks-path, --limit and --num-fewshot go with --tasks; name the tasks to run")
    exit = None if arguments.confidence_exit is None else Exit.read(arguments.confidence_exit)
    if exit is not None and arguments.refinements is not None:
        raise UserError("--confidence-exit is evaluated exactly, as generation runs it; leave out --refinements")
    loaded = load_model(arguments.checkpoint)
    if arguments.text:
        batches, data = text_batches(loaded, arguments.text)
    else:
        batches, data = split_batches(loaded, arguments.data, arguments.split, arguments.samples)
    refinements = arguments.refinements
    if refinements is None:
        refinements = sorted({0, loaded.config.ponder_training.evaluation_refinements})
    ways = settings(loaded.model, arguments.threshold, arguments.router_bias, refinements, exit)
    progress = track(ways, "evaluating", console=console, disable=not console.is_terminal, transient=True)
    results = [evaluate(loaded.model, batches, way, _byte_counter(loaded)) for way in progress]
    inference = loaded.config.inference
    content = {
        "checkpoint": loaded.folder.name,
        "data": data,
        "threshold": inference.threshold if arguments.threshold is None else arguments.threshold,
        "router_bias": inference.router_bias if arguments.router_bias is None else arguments.router_bias,
        "confidence_exit": None if exit is None else str(exit),
        "evaluations": [result.as_dict() for result in results],
    }
    return _table(results, loaded), content


def _prepare(arguments: argparse.Namespace) -> None:
    from megatron_ponder.evaluation.harness import TaskSet

    if not arguments.tasks:
        raise UserError("--prepare goes with --tasks; name the tasks to make ready")
    if arguments.checkpoint or arguments.export:
        raise UserError("--prepare evaluates nothing; leave --checkpoint and --export out")
    tasks = TaskSet(arguments.tasks, arguments.tasks_path)
    tasks.prepare()
    print(f"ready: {', '.join(tasks.names)}")


def _on_tasks(arguments: argparse.Namespace, console: Console) -> tuple[Table, dict]:
    from megatron_ponder.evaluation.harness import TaskSet, evaluate_tasks, exported  # transformers takes its time

    if arguments.text or arguments.data or arguments.refinements is not None:
        raise UserError("--text, --data and --refinements do not go with --tasks; run one command for each")
    if arguments.confidence_exit is not None:
        raise UserError(
            "--confidence-exit does not go with --tasks; set ponder_confidence_exit in an --export's config"
        )
    if (arguments.export is None) == (arguments.checkpoint is None):
        raise UserError("tasks run on a --checkpoint or an --export; give one of them")
    if arguments.export and (arguments.threshold is not None or arguments.router_bias is not None):
        raise UserError(
            "--threshold and --router-bias go with --checkpoint; of an export, change ponder_threshold and "
            "ponder_router_bias in its config.json"
        )
    tasks = TaskSet(arguments.tasks, arguments.tasks_path)
    source = exported(arguments.checkpoint, arguments.threshold, arguments.router_bias)
    with nullcontext(arguments.export) if arguments.export else source as folder:
        result = evaluate_tasks(folder, tasks, arguments.limit, arguments.num_fewshot, arguments.batch_size)
    table = Table(title=f"{result.checkpoint}: lm-evaluation-harness {result.harness}, {result.setting}")
    table.add_column("task")
    table.add_column("metric")
    for heading in ("value", "±", "samples", "shots"):
        table.add_column(heading, justify="right")
    for score in result.tasks:
        error = "–" if score.stderr is None else f"{score.stderr:.4f}"
        samples = f"{score.samples:,}" if score.samples else "–"
        table.add_row(score.task, score.metric, f"{score.value:.4f}", error, samples, str(score.shots))
    return table, result.as_dict()


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
