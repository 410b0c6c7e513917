"""Figures of an analysis, each with the rows that it is drawn from, in one style."""

import csv
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from megatron_ponder.base.files import replacing
from megatron_ponder.evaluation.analysis import HALVES, PAPER_FACTOR, Row
from megatron_ponder.evaluation.statistics import mean_and_range
from megatron_ponder.runs.style import STYLE, finish, look, merged_labels

STEPS_LABEL = "mean latent steps per token (K̂)"
LOSS_LABEL = "loss [nats per token]"
PANELS_PER_ROW = 3
LEAST_GAP = 1e-7  # nats, of what has no place on a logarithmic axis or is rounding
EXITS = {"entropy": "-.", "margin": (0, (1, 1))}  # sweeps of confidence exits, and their lines
CHARACTER = 0.021  # width of a character of a small label, as a share of the width of a panel


def write_rows(rows: Sequence[Row], path: Path) -> None:
    """Write rows as CSV; columns are those of all rows, in the order in which they appear."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with replacing(path) as aside, aside.open("w", encoding="utf-8", newline="") as out:
        writer = csv.DictWriter(out, columns)
        writer.writeheader()
        writer.writerows(rows)


def draw(tables: dict[str, list[Row]], folder: Path) -> dict[str, str]:
    """Draw every figure that there are rows for, as NAME.png and NAME.svg in a folder.

    Returns:
        The caption of each figure drawn, by name.
    """
    captions = {}
    for name, (caption, figure_of) in FIGURES.items():
        if not tables.get(name):
            continue
        with matplotlib.rc_context(STYLE):
            figure = figure_of(tables[name])
            FigureCanvasAgg(figure)
            with replacing(folder / f"{name}.png") as aside:
                figure.savefig(aside, dpi=150)
            with replacing(folder / f"{name}.svg") as aside:
                figure.savefig(aside, metadata={"Date": None})
        captions[name] = caption
    return captions


def _models(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(row["model"] for row in rows))


def _where(rows: Sequence[Row], **values) -> list[Row]:
    return [row for row in rows if all(row[name] == value for name, value in values.items())]


def _column(rows: Sequence[Row], name: str) -> list:
    return [row[name] for row in rows]


def _looks(rows: Sequence[Row]) -> dict[str, dict]:
    """Colour and marker of every model, by its name; models of one mode share the colour."""
    modes = {row["model"]: row["mode"] for row in rows}
    earlier = Counter()
    looks = {}
    for model, mode in modes.items():
        looks[model] = look(mode, earlier[mode])
        earlier[mode] += 1
    return looks


def _settings(rows: Sequence[Row]) -> str:
    return ", ".join(dict.fromkeys(row["evaluation"] for row in rows))


def _error_bars(panels: Sequence[Axes], rows: Sequence[Row], x: str, names: Sequence[str], style: dict) -> None:
    """One model's mean and standard error of a quantity in each panel."""
    for axes, name in zip(panels, names, strict=True):
        axes.errorbar(
            _column(rows, x), _column(rows, name), yerr=_column(rows, f"{name}_standard_error"), linestyle="-",
            linewidth=1.2, capsize=3, label=rows[0]["model"], **style,
        )  # fmt: skip


def _panels(count: int, shared_y: bool = True) -> tuple[Figure, list[Axes]]:
    columns = min(count, PANELS_PER_ROW)
    rows = -(-count // columns)
    figure = Figure(figsize=(max(5.2, 3.8 * columns), 3.6 * rows), layout="constrained")
    panels = list(figure.subplots(rows, columns, squeeze=False, sharey=shared_y).flat)
    for unused in panels[count:]:
        unused.set_visible(False)
    return figure, panels[:count]


def quality_compute(rows: Sequence[Row]) -> Figure:
    """Loss against mean K̂, and against FLOPs: curves over τ, α and exits, a random control, points of other modes."""
    figure = Figure(figsize=(10.5, 4.6), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, x in zip(panels, ("mean_steps", "mflops"), strict=True):
        for model, style in _looks(rows).items():
            of_model = _where(rows, model=model)
            for point in _where(of_model, sweep="trained"):
                label = model if point["mode"] in model else f"{model} ({point['mode']})"
                axes.plot(point[x], point["loss"], linestyle="none", label=label, **style | {"markersize": 8})
            _sweeps(axes, of_model, x, style)
            _random_control(axes, of_model, x, style)
    finish(panels[0], STEPS_LABEL, LOSS_LABEL)
    finish(panels[1], "MFLOPs of inference per token", "")
    panels[0].set_xlim(left=-0.05)
    figure.suptitle(f"Quality and compute ({_settings([row for row in rows if row['sweep'] not in EXITS])})")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=8)
    return figure


def _sweeps(axes: Axes, rows: Sequence[Row], x: str, style: dict) -> None:
    """One model's curves over τ (filled), α and exits (open), and a ring around its own τ and α."""
    exits = tuple((measure, line, f"exit by {measure}") for measure, line in EXITS.items())
    for sweep, line, symbol in (("threshold", "-", "τ"), ("bias", "--", "α"), *exits):
        curve = sorted(_where(rows, sweep=sweep), key=lambda row: row[x])
        if curve:
            face = style["color"] if sweep == "threshold" else "white"
            least, most = (row["bias" if sweep == "bias" else "threshold"] for row in (curve[0], curve[-1]))
            label = f"{curve[0]['model']}: {symbol} from {most:g} to {least:g}"
            axes.plot(
                *(_column(curve, name) for name in (x, "loss")),
                linestyle=line, markerfacecolor=face, linewidth=1.2, label=label, **style,
            )  # fmt: skip
    for own in _where(rows, sweep="threshold", own=True):
        label = f"{own['model']}: its own τ = {own['threshold']:g}, α = {own['bias']:g}"
        axes.plot(
            own[x], own["loss"], "o", markersize=12, markerfacecolor="none", color=style["color"], label=label
        )  # fmt: skip


def _random_control(axes: Axes, rows: Sequence[Row], x: str, style: dict) -> None:
    """As many steps as one model takes at each τ, for tokens drawn at random: mean and range over the draws."""
    control = _where(rows, sweep="random")
    if not control:
        return
    at = list(dict.fromkeys(_column(control, "threshold")))
    chosen = [_where(control, threshold=threshold) for threshold in at]
    places = [statistics.fmean(_column(group, x)) for group in chosen]
    means, *bars = zip(*(mean_and_range(_column(group, "loss")) for group in chosen), strict=True)
    axes.errorbar(
        places, means, yerr=bars, linestyle=":", linewidth=1.2, capsize=2, alpha=0.7,
        **style | {"marker": "x"}, label=f"{control[0]['model']}: as many steps for tokens drawn at random",
    )  # fmt: skip


def benefit(rows: Sequence[Row]) -> Figure:
    """What latent steps gain, by K̂, and how hard those tokens were before them."""
    figure, panels = _panels(2, shared_y=False)
    for model, style in _looks(rows).items():
        of_model = _where(rows, model=model)
        _error_bars(panels, of_model, "steps", ("gain", "first_loss"), style)
        for row in of_model if len(_models(rows)) == 1 else []:
            axes = panels[0]
            axes.annotate(
                f"{row['tokens']:,} tokens", (row["steps"], row["gain"]), textcoords="offset points", xytext=(4, 7),
                fontsize=7,
            )  # fmt: skip
    for axes in panels:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.margins(x=0.15)
    panels[0].axhline(0, color="black", linewidth=0.8)
    finish(panels[0], "latent steps of the token (K̂)", "ΔCE: step 0 less fused [nats]")
    finish(panels[1], "latent steps of the token (K̂)", "step-0 loss [nats]")
    panels[1].legend(fontsize=8)
    figure.suptitle(f"Where steps help; mean ± standard error ({_settings(rows)})")
    return figure


def difficulty(rows: Sequence[Row]) -> Figure:
    """Mean K̂ of tokens from easy to hard, beside what the identity of the token alone says."""
    figure, panels = _panels(len(_models(rows)))
    for axes, (model, style) in zip(panels, _looks(rows).items(), strict=True):
        of_model = _where(rows, model=model)
        x = _column(of_model, "first_loss")
        axes.errorbar(
            x, _column(of_model, "mean_steps"), yerr=_column(of_model, "mean_steps_standard_error"), linewidth=1.2,
            capsize=3, label="router", **style,
        )  # fmt: skip
        axes.plot(
            x, _column(of_model, "mean_steps_by_identity"), linestyle=":", color="black", marker="x", markersize=5,
            label="mean over the same token",
        )  # fmt: skip
        axes.set_title(model, fontsize=9)
        axes.legend(fontsize=8)
        finish(axes, "step-0 loss, mean of each tenth of the tokens [nats]", STEPS_LABEL if axes is panels[0] else "")
    figure.suptitle(f"Steps and difficulty ({_settings(rows)})")
    return figure


def shifting(rows: Sequence[Row]) -> Figure:
    """What more and fewer steps than the router's choice do to easy and to hard tokens."""
    figure, panels = _panels(len(_models(rows)))
    for axes, (model, style) in zip(panels, _looks(rows).items(), strict=True):
        for half, line, face in zip(HALVES, ("--", "-"), ("white", style["color"]), strict=True):
            curve = _where(rows, model=model, half=half)
            steps, change = _column(curve, "mean_steps"), _column(curve, "loss_change")
            axes.plot(
                steps, change, linestyle=line, linewidth=1.2, label=f"{half} half", markerfacecolor=face, **style
            )  # fmt: skip
        for row in _where(curve, own=True):
            axes.axvline(row["mean_steps"], color="black", linewidth=0.8, linestyle=":", label="its own α")
        _label_biases(axes, curve)
        axes.axhline(0, color="black", linewidth=0.8)
        axes.set_title(model, fontsize=9, pad=18)
        axes.legend(fontsize=8, title="by step-0 loss", title_fontsize=8)
        finish(axes, STEPS_LABEL, "change of the loss [nats per token]" if axes is panels[0] else "")
    figure.suptitle(f"The router's choice shifted by α ({_settings(rows)})")
    return figure


def _label_biases(axes: Axes, curve: Sequence[Row]) -> None:
    """α of every point, above the panel; of points that lie too close together, in one label."""
    left, right = axes.get_xlim()
    places = [((row["mean_steps"] - left) / (right - left), f"{row['bias']:g}") for row in curve]
    for number, (place, label) in enumerate(merged_labels(places, CHARACTER)):
        shown = label.replace("-", "\N{MINUS SIGN}")
        axes.annotate(
            f"α = {shown}" if number == 0 else shown, (place, 1), xycoords="axes fraction", textcoords="offset points",
            xytext=(0, 4), ha="center", fontsize=7,
        )  # fmt: skip


def contraction(rows: Sequence[Row]) -> Figure:
    """Distance to the fixed point after each Jacobi iteration."""
    figure, (axes,) = _panels(1)
    for index, (model, style) in enumerate(_looks(rows).items()):
        of_model = _where(rows, model=model)
        # A distance of 0 has no place on a logarithmic axis: it is shown on its edge, and said.
        curve = [row for row in of_model if row["rmse"] > 0]
        axes.plot(
            _column(curve, "refinements"), _column(curve, "rmse"), linestyle="-", linewidth=1.2, label=model, **style
        )  # fmt: skip
        reached = [row["refinements"] for row in of_model if row["rmse"] == 0]
        if reached:
            axes.plot(
                reached, [0] * len(reached), linestyle="none", markerfacecolor="white", clip_on=False,
                transform=axes.get_xaxis_transform(), label=f"{model}: 0, the fixed point itself", **style,
            )  # fmt: skip
        if index == 0 and curve:
            x = _column([row for row in curve if row["used"]] or curve, "refinements")
            paper = [curve[0]["rmse"] * PAPER_FACTOR**step for step in x]
            axes.plot(x, paper, linestyle=":", color="black", label=f"a factor of {PAPER_FACTOR}, as in the paper")
    axes.set_yscale("log")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(fontsize=8)
    finish(axes, "Jacobi refinements (R)", "RMSE of hidden states to the fixed point")
    figure.suptitle(f"Contraction of the Jacobi iterates ({', '.join(dict.fromkeys(_column(rows, 'rule')))} mask)")
    return figure


def refinements(rows: Sequence[Row]) -> Figure:
    """Loss with R Jacobi refinements and at the fixed point, and the distance between the two."""
    figure = Figure(figsize=(10.5, 4.6), layout="constrained")
    panels = figure.subplots(1, 2)
    places = {r: place for place, r in enumerate(sorted({row["refinements"] for row in rows}))}
    fixed_point = len(places)  # one place further
    for model, style in _looks(rows).items():
        of_model = sorted(_where(rows, model=model), key=lambda row: row["refinements"])
        x = [places[row["refinements"]] for row in of_model]
        panels[0].plot(x, _column(of_model, "loss"), linestyle="-", linewidth=1.2, label=model, **style)
        panels[0].plot(fixed_point, of_model[-1]["exact_loss"], markerfacecolor="white", linestyle="none", **style)
        gaps = [max(abs(row["gap"]), LEAST_GAP) for row in of_model]
        panels[1].plot(x, gaps, linestyle="-", linewidth=1.2, **style)
        for place, row, gap in zip(x, of_model, gaps, strict=True):
            if row["trained"]:
                for axes, y in ((panels[0], row["loss"]), (panels[1], gap)):
                    axes.plot(place, y, "o", markersize=12, markerfacecolor="none", color=style["color"])
    panels[1].set_yscale("log")
    for axes, label in zip(panels, (LOSS_LABEL, "distance of the loss to that of exact [nats per token]"), strict=True):
        more = {"exact": fixed_point} if axes is panels[0] else {}
        axes.set_xticks([*places.values(), *more.values()], [*places, *more])
        finish(axes, "Jacobi refinements (R)", label)
    rules = (f"{rule}, jacobi(R)" for rule in dict.fromkeys(_column(rows, "rule")))
    figure.suptitle(f"Loss with R refinements in place of token by token ({', '.join(rules)})")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    return figure


def depth(rows: Sequence[Row]) -> Figure:
    """Loss and mean K̂ of answers by their true depth."""
    rows = [row for row in rows if row["depth"] is not None]
    figure, panels = _panels(2, shared_y=False)
    for model, style in _looks(rows).items():
        _error_bars(panels, _where(rows, model=model), "depth", ("loss", "mean_steps"), style)
    for axes in panels:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_ylim(bottom=0)
    finish(panels[0], "true depth of the answer", LOSS_LABEL)
    finish(panels[1], "true depth of the answer", STEPS_LABEL)
    panels[0].legend(fontsize=8)
    figure.suptitle(f"Loss and steps by true depth; mean ± standard error ({_settings(rows)})")
    return figure


FIGURES: dict[str, tuple[str, Callable[[Sequence[Row]], Figure]]] = {
    "quality_compute": (
        "Loss against compute. Filled markers: sweep of the threshold τ. Open markers: sweep of the router bias α, or "
        "of the confidence at which tokens of a fixed model stop (exact, with the head after every slot). Ring: the "
        "model's own τ and α. Crosses: the same numbers of steps given to tokens drawn at random, with the range over "
        "the draws. Single markers: models without a router.",
        quality_compute,
    ),
    "benefit": (
        "What latent steps gain for the tokens that take them (left), and how hard these were without (right).",
        benefit,
    ),
    "difficulty": (
        "Steps of tokens from easy to hard. If the dotted line, which gives each token the mean of its kind, were as "
        "steep, the router would only know which token it is.",
        difficulty,
    ),
    "shifting": (
        "What would happen if the router gave more or fewer steps than it chose to, for the half of the tokens that "
        "is easy at step 0 and for the half that is hard.",
        shifting,
    ),
    "contraction": ("How fast the parallel passes of training approach the model that they stand for.", contraction),
    "refinements": (
        "What the model loses with R parallel refinements in place of decoding token by token, which is open (left). "
        "Ring: the largest R of training. A model whose loss is least at its own R has learnt to need it.",
        refinements,
    ),
    "depth": ("Loss and latent steps of answers of known depth.", depth),
}
