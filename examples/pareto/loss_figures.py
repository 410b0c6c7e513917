"""Loss against everything that it costs, over all seeds: a figure for each cost, all of them drawn alike."""

import math
import statistics
import textwrap
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
from costs import training_cost
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.transforms import Bbox
from runs import Run
from tables import curves, read_points

from megatron_ponder.base.files import replacing
from megatron_ponder.runs.style import STYLE, finish, look

LOSS = "validation loss [nats per token]"
# Variants from which something is taken away, or that are trained otherwise: no points of their mode's curve.
CONTROLS = ("adaptive-identity", "adaptive-own", "adaptive-batch-penalty", "fixed-own", "fixed-constant")
CONTROLS += ("fixed-weighted", "vanilla-longer", "vanilla-wider")
TITLE = 80  # characters of a line
# Where the label of a point may stand: points from it, and directions in degrees, the best first.
DISTANCES, DIRECTIONS = (8, 15, 24, 36, 50, 66), (0, 180, 20, 160, -20, -160, 60, 120, -60, -120, 90, -90)


class Cost(NamedTuple):
    """What a loss is drawn against.

    Attributes:
        name: of the figure's file.
        label: of its axis.
        unit: that the axis counts in.
        of_inference: a mode's variants are points of a curve.
    """

    name: str
    label: str
    unit: float
    of_inference: bool


COSTS = (
    Cost("pareto", "FLOPs of inference per token [M]", 1e6, of_inference=True),
    Cost("kv_entries", "KV entries per token", 1, of_inference=True),
    Cost("generation_time", "measured time of generation per token [ms]", 1e-3, of_inference=True),
    Cost("training_flops", "model FLOPs of training [T]", 1e12, of_inference=False),
    Cost("training_time", "measured time of training [s]", 1, of_inference=False),
)


class Measured(NamedTuple):
    """One run: loss in nats per token, its mode, and its costs by name, without those that it has not."""

    loss: float
    mode: str
    costs: dict[str, float]


def write_figures(
    runs: Sequence[Run], folders: Mapping[int, Path], times: Mapping[tuple[str, int], float], output: Path, modes: bool
) -> None:
    """Draw loss against each cost as NAME.png and NAME.svg.

    Args:
        runs: of all seeds.
        folders: of the analyses by seed.
        times: seconds a generated token, by variant and seed.
        output: for the figures.
        modes: whether modes are compared, so that each is drawn as a curve; and not ways of training one of them.
    """
    seeds = [_measured(runs, seed, folder, times) for seed, folder in folders.items()]
    for cost in COSTS:
        found = [{name: run for name, run in seed.items() if cost.name in run.costs} for seed in seeds]
        if found[0]:
            with matplotlib.rc_context(STYLE):
                figure = draw(found, cost, modes and cost.of_inference)
                for ending, options in (("png", {"dpi": 150}), ("svg", {"metadata": {"Date": None}})):
                    with replacing(output / f"{cost.name}.{ending}") as aside:
                        figure.savefig(aside, format=ending, **options)


def _measured(
    runs: Sequence[Run], seed: int, folder: Path, times: Mapping[tuple[str, int], float]
) -> dict[str, Measured]:
    """The runs of a seed by variant."""
    points, found = read_points(folder, seed), {}
    for run in (run for run in runs if run.seed == seed):
        point, (flops, seconds) = points[run.variant], training_cost(run)
        costs = {"pareto": 1e6 * point.mflops, "kv_entries": point.summary.get("kv_entries", 1 + point.steps)}
        costs |= {"training_flops": flops, "training_time": seconds}
        if (run.variant, seed) in times:
            costs["generation_time"] = times[run.variant, seed]
        found[run.variant] = Measured(point.loss, point.summary["mode"], costs)
    return found


def draw(seeds: Sequence[Mapping[str, Measured]], cost: Cost, modes: bool) -> Figure:
    """Every variant with its name, in the colour of its mode.

    Args:
        seeds: their runs by variant.
        cost: along the axis.
        modes: draw a line through the variants of each mode; those of `fixed` and `loop` begin at vanilla, as the
            comparison at equal compute takes them.
    """
    figure = Figure(figsize=(8, 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    axes, earlier = figure.subplots(), Counter()
    places, looks, bars = {}, {}, {}
    for variant, run in seeds[0].items():
        losses = [seed[variant].loss for seed in seeds]
        mean = statistics.fmean(seed[variant].costs[cost.name] for seed in seeds)
        places[variant] = (mean / cost.unit, statistics.fmean(losses))
        looks[variant], bars[variant] = look(run.mode, earlier[run.mode]), 0.0
        earlier[run.mode] += 1
        if len(losses) > 1:
            bars[variant] = statistics.stdev(losses)
    above = _frame(axes, {name: loss for name, (_, loss) in places.items()}, bars)
    shown = {name: place for name, place in places.items() if name not in above}
    for name, place in shown.items():  # a bar of what is above would reach through the frame
        axes.errorbar(*place, yerr=bars[name] or None, capsize=3, linestyle="none", **looks[name])
    if modes:
        _lines(axes, seeds[0], places, looks)
    finish(axes, cost.label, LOSS)
    over = f"mean ± standard deviation over {len(seeds)} seeds" if len(seeds) > 1 else "one seed"
    named = ", ".join(f"{name} ({places[name][1]:.2f})" for name in above)
    figure.suptitle(textwrap.fill(f"{over}; above the frame: {named}" if above else over, TITLE))
    label_points(axes, shown, {name: style["color"] for name, style in looks.items()}, bars)
    return figure


def _lines(
    axes: Axes, runs: Mapping[str, Measured], places: Mapping[str, tuple[float, float]], looks: Mapping[str, dict]
) -> None:
    """A line through the variants of each mode."""
    variants_of = defaultdict(list)
    for variant, run in runs.items():
        variants_of[run.mode].append(variant)
    for mode, variants in variants_of.items():
        names = {*curves(places).get(mode, ()), *(variant for variant in variants if variant not in CONTROLS)}
        line = zip(*sorted(places[name] for name in names), strict=True)
        axes.plot(*line, linewidth=0.8, alpha=0.6, color=looks[variants[0]]["color"], label=mode)


def _frame(axes: Axes, losses: Mapping[str, float], bars: Mapping[str, float]) -> list[str]:
    """Let the frame end above vanilla, and leave room for names; which variants it leaves out."""
    most = losses.get("vanilla", max(losses.values()))
    others = [name for name, loss in losses.items() if name.startswith("vanilla") or loss <= most]
    best, worst = min(losses[name] - bars[name] for name in others), max(losses[name] + bars[name] for name in others)
    room = 0.1 * (worst - best) or 0.05
    axes.set_ylim(best - room, worst + room)
    axes.margins(x=0.2)
    return [name for name, loss in losses.items() if loss > worst + room]


def label_points(
    axes: Axes,
    places: Mapping[str, tuple[float, float]],
    colours: Mapping[str, str],
    bars: Mapping[str, float],
) -> list[Text]:
    """Write its name beside every point, where no other name, point or bar is; with a line to it from further away.

    Args:
        axes: with its limits.
        places: of the points by name, all inside the frame.
        colours: of the names.
        bars: how far error bars reach, up and down.
    """
    axes.figure.draw_without_rendering()
    taken = []
    for name, (x, y) in places.items():
        low, high = axes.transData.transform([(x, y - bars[name]), (x, y + bars[name])])
        taken.append(Bbox([low - 6, high + 6]))
    written = []
    for name, place in places.items():
        text = axes.annotate(
            name, place, (0, 0), textcoords="offset points", fontsize=8, color=colours[name], va="center",
            bbox={"pad": 0.5, "facecolor": "white", "alpha": 0.7, "linewidth": 0},
        )  # fmt: skip
        size = text.get_window_extent()
        tried = [_tried(axes, place, size, *spot, taken) for spot in _spots()]
        _, (across, up), side, box = min(tried, key=lambda attempt: attempt[0])
        text.set_horizontalalignment(side)
        text.xyann = (across, up)
        if math.hypot(across, up) > DISTANCES[1]:
            axes.annotate("", place, (across, up), textcoords="offset points", arrowprops=_leader(colours[name]))
        taken.append(box)
        written.append(text)
    return written


def _spots() -> list[tuple[int, int]]:
    """Distances and directions, the nearest first."""
    return [(distance, direction) for distance in DISTANCES for direction in DIRECTIONS]


def _tried(
    axes: Axes, place: tuple[float, float], size: Bbox, distance: int, direction: int, taken: Sequence[Bbox]
) -> tuple[float, tuple[float, float], str, Bbox]:
    """How bad a spot for a name is, its offset in points, how the name is aligned there, and what it covers."""
    angle = math.radians(direction)
    across, up = distance * math.cos(angle), distance * math.sin(angle)
    side = "left" if across > 1e-6 else "right" if across < -1e-6 else "center"
    x, y = axes.transData.transform(place) + axes.figure.dpi / 72 * np.array([across, up])
    left = {"left": x, "right": x - size.width, "center": x - size.width / 2}[side]
    box = Bbox.from_bounds(left, y - size.height / 2, size.width, size.height)
    inside = axes.bbox.contains(*box.min) and axes.bbox.contains(*box.max)
    covered = sum(box.overlaps(other) for other in taken)
    return 100 * (covered + 2 * (not inside)) + distance, (across, up), side, box


def _leader(colour: str) -> dict:
    """A thin line between a name and its point."""
    return {"arrowstyle": "-", "linewidth": 0.5, "color": colour, "alpha": 0.7, "shrinkA": 5, "shrinkB": 4}
