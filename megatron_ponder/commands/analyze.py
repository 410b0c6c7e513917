"""Show what models do with their latent steps: figures, tables, a page with shaded text.

    ponder analyze --checkpoint runs/quickstart --output runs/analysis
    ponder analyze --checkpoint runs/vanilla runs/fixed runs/adaptive --output runs/analysis

All checkpoints are measured on the same tokens, those of the first one's validation split unless others are named. The
folder then holds index.html with everything inside, a PNG, an SVG and a CSV of every figure, and analysis.json.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor

from megatron_ponder.base.command_line import Parser
from megatron_ponder.base.errors import UserError, command
from megatron_ponder.base.files import check_writable, write_atomically
from megatron_ponder.base.launch import one_process
from megatron_ponder.base.paths import expand_user
from megatron_ponder.checkpoint.load import LoadedModel, load_model
from megatron_ponder.config.command_options import Number, add_options, from_options
from megatron_ponder.config.declarations import STEPS, Range
from megatron_ponder.evaluation.analysis import Analysis, analyse
from megatron_ponder.evaluation.analysis_plan import AnalysisPlan
from megatron_ponder.evaluation.figures import draw, write_rows
from megatron_ponder.evaluation.report import write_page
from megatron_ponder.evaluation.sources import (
    SPLIT_HELP,
    EvaluationBatches,
    depth_batches,
    split_batches,
    text_batches,
)
from megatron_ponder.evaluation.subjects import subjects_of
from megatron_ponder.parallel.cpu_settings import prepare_cpu
from megatron_ponder.parallel.mesh import Mesh


@command
@one_process
def main(argv: Sequence[str]) -> None:
    """Parse the command line, measure, draw, print a summary."""
    parser = Parser("analyze", __doc__)
    parser.add_argument("--checkpoint", type=Path, nargs="+", required=True, help="run folders or checkpoint folders")
    parser.add_argument("--output", type=Path, required=True, help="folder for everything that is made")
    parser.add_argument("--text", type=Path, help="a UTF-8 text file to measure on, in place of the split")
    parser.add_argument(
        "--data", type=expand_user, help="dataset prefix; that of the first checkpoint's training run unless given"
    )
    parser.add_argument("--split", default="valid", help=SPLIT_HELP)
    parser.add_argument(
        "--samples", type=Number("samples", int, Range(1, STEPS)), default=32, help="samples of the split (default: 32)"
    )
    parser.add_argument(
        "--depths", type=expand_user, help="prefix of the indexed dataset that holds the true depth of every token"
    )
    add_options(
        parser,
        AnalysisPlan,
        *("refinements", "thresholds", "biases", "entropies", "margins", "random_draws", "refinement_sweep", "listed"),
    )
    parser.add_argument("--device", default="cpu", help="where to compute (default: cpu)")
    arguments = parser.parse_args(argv)

    check_writable(arguments.output)
    prepare_cpu()
    plan = from_options(AnalysisPlan, arguments)
    device = _device(arguments.device)
    models = [load_model(path, Mesh(device=device)) for path in arguments.checkpoint]
    subjects = subjects_of(models)
    (batches, data), depths = _inputs(models[0], arguments)
    tokenizer = models[0].tokenizer
    console = Console(width=None if sys.stdout.isatty() else 110, highlight=False)
    columns = (SpinnerColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:
        task = progress.add_task("", total=sum(plan.measurements(subject) for subject in subjects))
        analysis = analyse(
            subjects,
            batches,
            plan,
            str if tokenizer is None else tokenizer.piece,
            depths,
            lambda what: progress.update(task, description=what, advance=1),
        )
    for name, rows in analysis.tables.items():
        write_rows(rows, arguments.output / f"{name}.csv")
    content = json.dumps({"data": data, "models": analysis.summary}, indent=1, ensure_ascii=False)
    write_atomically(arguments.output / "analysis.json", content + "\n")
    captions = draw(analysis.tables, arguments.output)
    page = write_page(analysis, captions, arguments.output, f"Pondering of {', '.join(analysis.summary)}", data)
    _print(analysis, console)
    console.print(f"{page}: open it in a browser; figures and tables lie beside it")


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--device {name} cannot be used here ({reason}); choose cpu, or cuda on a GPU") from error
    return device


def _inputs(loaded: LoadedModel, arguments: argparse.Namespace) -> tuple[EvaluationBatches, list[Tensor] | None]:
    if arguments.text:
        if arguments.depths:
            raise UserError("--depths belong to a dataset; leave out --text")
        return text_batches(loaded, arguments.text), None
    where = (arguments.data, arguments.split, arguments.samples)
    inputs = split_batches(loaded, *where)
    return inputs, depth_batches(loaded, *where, arguments.depths) if arguments.depths else None


def _print(analysis: Analysis, console: Console) -> None:
    table = Table(title="loss in nats per token, steps per token")
    table.add_column("model", no_wrap=True)
    for heading in ("mode", "rule, evaluation", "loss", "steps", "ρ(K̂, step-0)", "by identity", "factor"):
        table.add_column(heading, justify="right")
    for label, of in analysis.summary.items():
        difficulty, factor = of.get("difficulty", {}), of.get("contraction", {}).get("factor")
        correlations = [difficulty.get(name) for name in ("rank_correlation", "rank_correlation_by_identity")]
        figures = ["–" if value is None else f"{value:.3f}" for value in (*correlations, factor)]
        row = [label, of["mode"], of["evaluation"], f"{of['loss']:.4f}", f"{of['mean_steps']:.3f}", *figures]
        table.add_row(*row)
    console.print(table)
    for label, of in analysis.summary.items():
        if "depth" in of:
            correlation, answers, others = of["depth"].values()
            by_depth = "–" if correlation is None else f"{correlation:.3f}"
            console.print(f"{label}: ρ(K̂, true depth) of answers {by_depth}; {answers:.3f} steps", end="")
            console.print("" if others is None else f", all else {others:.3f}")
        for gap in of.get("gaps", []):
            at = "" if gap["threshold"] is None else f" at τ = {gap['threshold']:g}"
            console.print(f"{label}: {gap['of']} less {gap['from']}{at}: {gap['loss']:+.5f} nats")
        for why in of["missing"]:
            console.print(f"{label}: not shown: {why}", markup=False)
