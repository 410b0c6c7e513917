"""What training has cost and what it has brought, over all seeds, as a table."""

import csv
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from runs import Run
from tables import read_points, spread

from megatron_ponder.base.files import replacing, write_atomically
from megatron_ponder.runs.metrics import of_steps, read_metrics

HEADINGS = ("variant", "loss", "− the first", "K̂", "training TFLOPs", "of the first's", "seconds", "of the first's")


class Cost(NamedTuple):
    """One run: loss in nats per token, mean K̂, operations of its training, seconds of its steps, and its mode."""

    loss: float
    steps: float
    flops: float
    seconds: float
    mode: str


def write_costs(runs: Sequence[Run], folders: Mapping[int, Path], output: Path) -> str:
    """Write table.md and table.csv from the runs and the analyses of all seeds.

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
    return table


def _costs(seed: int, folder: Path, runs: Sequence[Run]) -> dict[str, Cost]:
    """The cost of every variant of a seed."""
    points, costs = read_points(folder, seed), {}
    for run in (run for run in runs if run.seed == seed):
        point = points[run.variant]
        costs[run.variant] = Cost(point.loss, point.steps, *training_cost(run), point.summary["mode"])
    return costs


def training_cost(run: Run) -> tuple[float, float]:
    """Operations of a run's training, and seconds of its steps."""
    records = of_steps(read_metrics(run.folder))
    flops, seconds = (sum(record[name] for record in records) for name in ("model_flops", "step_seconds"))
    return flops, seconds


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
