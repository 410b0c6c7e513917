"""What training has cost and what it has brought, over all seeds: a table and a figure."""

import csv
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from runs import Run
from tables import label_points, read_points, spread

from megatron_ponder.base.files import replacing, write_atomically
from megatron_ponder.runs.metrics import of_steps, read_metrics
from megatron_ponder.runs.style import look

HEADINGS = ("variant", "loss", "− the first", "K̂", "training TFLOPs", "of the first's", "seconds", "of the first's")
BAND = 0.08  # of the span of losses, above and below them


class Cost(NamedTuple):
    """One run: loss in nats per token, mean K̂, operations of its training, seconds of its steps, and its mode."""

    loss: float
    steps: float
    flops: float
    seconds: float
    mode: str


def write_costs(runs: Sequence[Run], folders: Mapping[int, Path], output: Path) -> str:
    """Write table.md, table.csv and costs.png from the runs and the analyses of all seeds.

    Args:
        runs: of all seeds.
        folders: of the analyses by seed.
        output: for what is written.

    Returns:
        The table in Markdown.
    """
    seeds = [_costs(seed, folder, runs) for seed, folder in folders.items()]
    lines = [HEADINGS, ["---"] * len(HEADINGS), *(_row(variant, seeds) for variant in seeds[0])]
    table = "".join("| " + " | ".join(line) + " |\n" for line in lines)
    write_atomically(output / "table.md", table)
    with replacing(output / "table.csv") as aside, aside.open("w", encoding="utf-8", newline="") as out:
        writer = csv.writer(out)
        writer.writerow(("variant", "seed", *Cost._fields))
        for seed, costs in zip(folders, seeds, strict=True):
            writer.writerows((variant, seed, *cost) for variant, cost in costs.items())
    _draw(seeds, output / "costs.png")
    return table


def _costs(seed: int, folder: Path, runs: Sequence[Run]) -> dict[str, Cost]:
    """The cost of every variant of a seed."""
    points, costs = read_points(folder, seed), {}
    for run in (run for run in runs if run.seed == seed):
        records, point = of_steps(read_metrics(run.folder)), points[run.variant]
        flops, seconds = (sum(record[name] for record in records) for name in ("model_flops", "step_seconds"))
        costs[run.variant] = Cost(point.loss, point.steps, flops, seconds, point.summary["mode"])
    return costs


def _row(variant: str, seeds: Sequence[dict[str, Cost]]) -> list[str]:
    """Cells of a variant; what is compared is compared within each seed."""
    first = next(iter(seeds[0]))
    pairs = [(costs[variant], costs[first]) for costs in seeds]
    cells = [variant, spread([cost.loss for cost, _ in pairs])]
    cells.append("" if variant == first else spread([cost.loss - other.loss for cost, other in pairs]))
    cells.append(f"{statistics.fmean(cost.steps for cost, _ in pairs):.2f}")
    for name, unit, digits in (("flops", 1e12, 2), ("seconds", 1, 0)):
        values = [(getattr(cost, name), getattr(other, name)) for cost, other in pairs]
        cells.append(f"{statistics.fmean(value for value, _ in values) / unit:.{digits}f}")
        cells.append(f"{statistics.fmean(value / other for value, other in values):.2f}")
    return cells


def _draw(seeds: Sequence[dict[str, Cost]], path: Path) -> None:
    """Loss against operations, and against seconds, of training; mean and standard deviation over the seeds."""
    figure = Figure(figsize=(12, 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2, sharey=True)
    axes_of = (("flops", 1e12, "model FLOPs of training [T]"), ("seconds", 1.0, "training time [s]"))
    for axes, (name, unit, label) in zip(panels, axes_of, strict=True):
        places, modes = {}, {}
        for variant, cost in seeds[0].items():
            losses = [costs[variant].loss for costs in seeds]
            modes[variant] = cost.mode
            places[variant] = (
                statistics.fmean(getattr(costs[variant], name) for costs in seeds) / unit,
                statistics.fmean(losses),
            )
            style = look(cost.mode, list(modes.values()).count(cost.mode) - 1)
            bar = statistics.stdev(losses) if len(losses) > 1 else None
            axes.errorbar(*places[variant], yerr=bar, capsize=3, linestyle="none", **style)
        axes.set_xlabel(label)
        _frame(axes, [loss for _, loss in places.values()])
        label_points(axes, places, modes)
    panels[0].set_ylabel("validation loss [nats per token]")
    with replacing(path) as aside:
        figure.savefig(aside, dpi=150, format="png")


def _frame(axes: Axes, losses: Sequence[float]) -> None:
    span = max(losses) - min(losses) or 1.0
    axes.set_ylim(min(losses) - BAND * span - 0.02, max(losses) + BAND * span + 0.02)
    axes.margins(x=0.2)
    axes.grid(alpha=0.3)
