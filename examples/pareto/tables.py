"""Over all seeds: loss at equal tokens and at equal compute, as a table."""

import csv
import json
import statistics
from collections import defaultdict
from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from megatron_ponder.base.files import replacing, write_atomically

HEADINGS = (
    "variant", "loss", "steps", "MFLOPs/token", "− fixed at these FLOPs", "− loop at these FLOPs",
    "− random K̂", "ρ(K̂, step-0)", "soft–hard", "Jacobi(3)", "contraction",
)  # fmt: skip


class Point(NamedTuple):
    """One run as it was trained: loss in nats per token, mean K̂, MFLOPs of inference per token, the rest of it."""

    loss: float
    steps: float
    mflops: float
    random: float | None
    summary: dict


def write_tables(folders: Mapping[int, Path], output: Path) -> str:
    """Write table.md and table.csv from the analyses of all seeds.

    Returns:
        The table in Markdown.
    """
    seeds = [read_points(folder, seed) for seed, folder in folders.items()]
    seeds = [
        points | _exits(points, folder, seed) for points, (seed, folder) in zip(seeds, folders.items(), strict=True)
    ]
    rows = [_row(variant, seeds) for variant in seeds[0]]
    lines = [HEADINGS, ["---"] * len(HEADINGS), *rows]
    table = "".join("| " + " | ".join(line) + " |\n" for line in lines)
    write_atomically(output / "table.md", table)
    with replacing(output / "table.csv") as aside, aside.open("w", encoding="utf-8", newline="") as out:
        writer = csv.writer(out)
        writer.writerow(("variant", "seed", "loss", "steps", "mflops", "loss_of_random_steps"))
        for seed, points in zip(folders, seeds, strict=True):
            writer.writerows((variant, seed, *point[:4]) for variant, point in points.items())
    if all((folder / "depth.csv").exists() for folder in folders.values()):
        by_depth = _by_depth(folders)
        write_atomically(output / "depths.md", by_depth)
        table += "\n" + by_depth
    return table


def _by_depth(folders: Mapping[int, Path]) -> str:
    """Loss of answers and mean K̂ on them, by true depth, over the seeds, as a table in Markdown."""
    losses, steps = defaultdict(list), defaultdict(list)
    for seed, folder in folders.items():
        with (folder / "depth.csv").open(encoding="utf-8", newline="") as rows:
            for row in csv.DictReader(rows):
                key = row["model"].removesuffix(f"-seed{seed}"), row["depth"]
                losses[key].append(float(row["loss"]))
                steps[key].append(float(row["mean_steps"]))
    depths = sorted({depth for _, depth in losses if depth}, key=int)
    headings = ["variant", *(f"loss, depth {depth}" for depth in depths), *(f"K̂, depth {depth}" for depth in depths)]
    lines = [[*headings, "K̂, no answer"], ["---"] * (2 * len(depths) + 2)]
    for variant in dict.fromkeys(variant for variant, _ in losses):
        cells = [spread(losses[variant, depth]) for depth in depths]
        lines.append([variant, *cells, *(spread(steps[variant, depth], 2) for depth in [*depths, ""])])
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def read_points(folder: Path, seed: int) -> dict[str, Point]:
    """The runs of a seed by variant, from the folder of its analysis."""
    summaries = json.loads((folder / "analysis.json").read_text(encoding="utf-8"))["models"]
    measured, points = _measured(folder), {}
    for label, summary in summaries.items():
        own = [row for row in measured if row["model"] == label and row["threshold"] == _text(summary["threshold"])]
        random = [float(row["loss"]) for row in own if row["sweep"] == "random"]
        trained = next(row for row in own if row["sweep"] in ("trained", "threshold"))
        points[label.removesuffix(f"-seed{seed}")] = Point(
            summary["loss"],
            summary["mean_steps"],
            float(trained["mflops"]),
            statistics.fmean(random) if random else None,
            summary,
        )
    return points


def _measured(folder: Path) -> list[dict[str, str]]:
    """Every point of the sweeps of an analysis."""
    with (folder / "quality_compute.csv").open(encoding="utf-8", newline="") as rows:
        return list(csv.DictReader(rows))


def _exits(points: Mapping[str, Point], folder: Path, seed: int) -> dict[str, Point]:
    """`fixed` whose tokens stop by their confidence, at the FLOPs of `adaptive`, between the thresholds measured."""
    rows, exits = [row for row in _measured(folder) if row["model"] == f"fixed-seed{seed}"], {}
    for measure in ("entropy", "margin"):
        of_measure = [row for row in rows if row["sweep"] == measure]
        curve = sorted(tuple(float(row[name]) for name in ("mflops", "loss", "mean_steps")) for row in of_measure)
        if curve and "adaptive" in points:
            mflops, losses, steps = zip(*curve, strict=True)
            at = min(max(points["adaptive"].mflops, mflops[0]), mflops[-1])
            loss, mean_steps = (float(np.interp(at, mflops, values)) for values in (losses, steps))
            exits[f"fixed-{measure}"] = Point(loss, mean_steps, at, None, {"mode": "fixed"})
    return exits


def _text(value: float | None) -> str:
    return "" if value is None else str(value)


def _row(variant: str, seeds: Sequence[dict[str, Point]]) -> list[str]:
    points = [points[variant] for points in seeds]
    cells = [variant, spread([point.loss for point in points])]
    cells += [f"{statistics.fmean(values):.2f}" for values in zip(*((p.steps, p.mflops) for p in points), strict=True)]
    for names in curves(seeds[0]).values():
        if variant in names or len(names) < 2:
            cells.append("")
        else:
            cells.append(spread([points[variant].loss - at_equal_compute(points, variant, names) for points in seeds]))
    cells.append("" if points[0].random is None else spread([point.loss - point.random for point in points]))
    correlations = [p.summary["difficulty"]["rank_correlation"] for p in points if "difficulty" in p.summary]
    cells.append(spread(correlations) if correlations else "")
    gaps = [gap for point in points for gap in point.summary.get("gaps", ()) if gap["threshold"] in (None, 1e-4)]
    for way in ("hard, exact", "hard, jacobi(3)"):
        sizes = [abs(gap["loss"]) for gap in gaps if gap["of"] == way]
        cells.append(f"{max(sizes):.5f}" if sizes else "")
    factors = [point.summary["contraction"]["factor"] for point in points if "contraction" in point.summary]
    cells.append(spread(factors, 2) if factors else "")
    return cells


def curves(variants: Container[str]) -> dict[str, list[str]]:
    """Points of the curves of `fixed` and `loop`; between two of them the loss is taken to be linear in FLOPs."""
    wanted = {mode: ("vanilla", mode, *(f"{mode}-{steps}" for steps in range(1, 5))) for mode in ("fixed", "loop")}
    return {mode: [name for name in names if name in variants] for mode, names in wanted.items()}


def spread(values: Sequence[float], digits: int = 3) -> str:
    """Mean ± standard deviation; the mean alone of one value."""
    mean = f"{statistics.fmean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def at_equal_compute(points: Mapping[str, Point], variant: str, names: Sequence[str]) -> float:
    """Loss of the curve through some variants at the FLOPs of another; the ends of the curve hold beyond it."""
    curve = sorted((points[name].mflops, points[name].loss) for name in names)
    return float(np.interp(points[variant].mflops, *zip(*curve, strict=True)))
