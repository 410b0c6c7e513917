"""Loss with R refinements, of every variant over all seeds: a table, and the figure of an analysis."""

import csv
import statistics
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

from tables import spread

from megatron_ponder.base.files import write_atomically
from megatron_ponder.evaluation.figures import draw

FILE = "refinements.csv"  # of an analysis


def write_refinements(folders: Mapping[int, Path], output: Path) -> str:
    """Write refinements.md, refinements.png and refinements.svg from the analyses of all seeds.

    Returns:
        The table in Markdown; empty if nothing was measured, or with another version.
    """
    if not all((folder / FILE).exists() for folder in folders.values()):
        return ""
    losses, exact, about = defaultdict(list), defaultdict(list), {}
    for seed, folder in folders.items():
        with (folder / FILE).open(encoding="utf-8", newline="") as rows:
            for row in csv.DictReader(rows):
                variant, refinements = row["model"].removesuffix(f"-seed{seed}"), int(row["refinements"])
                losses[variant, refinements].append(float(row["loss"]))
                exact[variant, refinements].append(float(row["exact_loss"]))
                about[variant, refinements] = {
                    "mode": row["mode"], "rule": row["rule"], "trained": row["trained"] == "True"
                }  # fmt: skip
    _draw(losses, exact, about, output)
    table = _table(losses, exact)
    write_atomically(output / "refinements.md", table)
    return table


def _draw(losses: Mapping, exact: Mapping, about: Mapping, output: Path) -> None:
    """Means over the seeds; of the distance to the fixed point too."""
    rows = []
    for key, values in losses.items():
        gaps = [abs(loss - of_exact) for loss, of_exact in zip(values, exact[key], strict=True)]
        loss, exact_loss, gap = (statistics.fmean(each) for each in (values, exact[key], gaps))
        row = {"model": key[0], "refinements": key[1], "loss": loss, "exact_loss": exact_loss, "gap": gap}
        rows.append(row | about[key])
    draw({"refinements": rows}, output)


def _table(losses: Mapping[tuple[str, int], list[float]], exact: Mapping[tuple[str, int], list[float]]) -> str:
    """Loss by R, and by `exact`."""
    variants = list(dict.fromkeys(variant for variant, _ in losses))
    columns = sorted({refinements for _, refinements in losses})
    lines = [["variant", *(f"R = {refinements}" for refinements in columns), "exact"]]
    lines.append(["---"] * len(lines[0]))
    for variant in variants:
        cells = [spread(losses[variant, refinements]) for refinements in columns]
        lines.append([variant, *cells, spread(exact[variant, columns[0]])])
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)
