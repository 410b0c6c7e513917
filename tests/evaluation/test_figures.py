"""Figures show the rows that lie beside them."""

import csv
import re

import matplotlib.image
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from megatron_ponder.evaluation.figures import FIGURES, draw, write_rows
from megatron_ponder.runs.style import COLOURS
from tests.evaluation.analyses import analysis_of_small_models


@pytest.fixture(scope="module")
def tables():
    return analysis_of_small_models().tables


@pytest.fixture(scope="module")
def folder(tables, tmp_path_factory):
    folder = tmp_path_factory.mktemp("figures")
    draw(tables, folder)
    return folder


def curves(figure, panel: int) -> list[tuple[list, list]]:
    return [(list(line.get_xdata()), list(line.get_ydata())) for line in figure.axes[panel].lines]


def columns(rows, *names):
    return tuple([row[name] for row in rows] for name in names)


@pytest.mark.parametrize("name", FIGURES)
def test_pictures_are_written(folder, name):
    pixels = matplotlib.image.imread(folder / f"{name}.png")[..., :3]
    wanted = [int(COLOURS["adaptive"][at : at + 2], 16) for at in (1, 3, 5)]
    assert (abs(pixels * 255 - wanted).max(-1) < 2).sum() > 50  # its mode's colour
    svg = (folder / f"{name}.svg").read_text()
    assert "adaptive" in svg
    assert "<dc:date>" not in svg


def test_a_figure_is_drawn_from_its_rows(tables):
    rows = [row for row in tables["quality_compute"] if row["model"] == "adaptive"]
    figure = FIGURES["quality_compute"][1](tables["quality_compute"])
    for panel, x in enumerate(("mean_steps", "mflops")):
        drawn = curves(figure, panel)
        for sweep in ("threshold", "bias"):
            ordered = sorted((row for row in rows if row["sweep"] == sweep), key=lambda row: row[x])
            assert columns(ordered, x, "loss") in drawn
        for model in ("fixed", "vanilla"):
            trained = [row for row in tables["quality_compute"] if (row["model"], row["sweep"]) == (model, "trained")]
            assert columns(trained, x, "loss") in drawn
        exits = [row for row in tables["quality_compute"] if row["sweep"] == "entropy"]
        assert columns(sorted(exits, key=lambda row: row[x]), x, "loss") in drawn
    for name, panel, (x, y) in (
        ("benefit", 0, ("steps", "gain")),
        ("benefit", 1, ("steps", "first_loss")),
        ("difficulty", 0, ("first_loss", "mean_steps")),
        ("difficulty", 0, ("first_loss", "mean_steps_by_identity")),
    ):
        of_model = [row for row in tables[name] if row["model"] == "adaptive"]
        assert columns(of_model, x, y) in curves(FIGURES[name][1](tables[name]), panel), name
    shifting = FIGURES["shifting"][1](tables["shifting"])
    for half in ("easy", "hard"):
        of_half = [row for row in tables["shifting"] if row["half"] == half]
        assert columns(of_half, "mean_steps", "loss_change") in curves(shifting, 0)
    depth = FIGURES["depth"][1](tables["depth"])
    answers = [row for row in tables["depth"] if row["model"] == "fixed" and row["depth"] is not None]
    assert columns(answers, "depth", "loss") in curves(depth, 0)


def test_a_model_has_the_colour_of_its_mode_in_every_figure(tables):
    for name, (_, figure_of) in FIGURES.items():
        only = [row for row in tables[name] if row["mode"] == "fixed"]
        if only:
            drawn = {line.get_color() for axes in figure_of(only).axes for line in axes.lines}
            assert COLOURS["fixed"] in drawn <= {COLOURS["fixed"], "black"}, name


def test_models_of_one_mode_share_its_colour_and_not_their_markers(tables):
    rows = [row for row in tables["quality_compute"] if row["mode"] == "vanilla"]
    figure = FIGURES["quality_compute"][1]([*rows, *(row | {"model": "other"} for row in rows)])
    first, second = figure.axes[0].lines
    assert first.get_color() == second.get_color() == COLOURS["vanilla"]
    assert first.get_marker() != second.get_marker()


def test_a_ring_is_around_what_the_model_was_trained_with(tables):
    (own,) = [row for row in tables["quality_compute"] if row["sweep"] == "threshold" and row["own"]]
    assert (own["threshold"], own["bias"]) == (0.3, 0.0)
    axes = FIGURES["quality_compute"][1](tables["quality_compute"]).axes[0]
    (ring,) = [line for line in axes.lines if "its own" in line.get_label()]
    assert ring.get_label() == "adaptive: its own τ = 0.3, α = 0"
    assert (ring.get_xdata(), ring.get_ydata()) == ([own["mean_steps"]], [own["loss"]])
    panel = FIGURES["shifting"][1](tables["shifting"]).axes[0]
    (at,) = [line for line in panel.lines if line.get_label() == "its own α"]
    assert list(at.get_xdata()) == [own["mean_steps"]] * 2


def test_contraction_shows_the_iterate_that_is_the_fixed_point(tables):
    rows = [row for row in tables["contraction"] if row["model"] == "adaptive"]
    apart, last = [row for row in rows if row["rmse"] > 0], rows[-1] | {"refinements": 99, "rmse": 0.0}
    axes = FIGURES["contraction"][1]([*apart, last]).axes[0]
    shown = {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines}
    assert shown["adaptive"] == columns(apart, "refinements", "rmse")
    assert shown["adaptive: 0, the fixed point itself"] == ([99], [0])


def test_the_loss_with_refinements_lies_beside_that_of_the_fixed_point(tables):
    rows = [row for row in tables["refinements"] if row["model"] == "fixed"]
    assert [row["refinements"] for row in rows if row["trained"]] == [1]
    figure = FIGURES["refinements"][1](rows)
    places = [*range(len(rows))]
    (losses, exact, ring), (gaps, _) = (axes.lines for axes in figure.axes)
    assert (list(losses.get_xdata()), list(losses.get_ydata())) == (places, [row["loss"] for row in rows])
    assert (list(exact.get_xdata()), list(exact.get_ydata())) == ([len(rows)], [rows[0]["exact_loss"]])
    assert (list(ring.get_xdata()), list(ring.get_ydata())) == ([1], [rows[1]["loss"]])
    assert list(gaps.get_ydata()) == [max(abs(row["gap"]), 1e-7) for row in rows]
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == [
        *(str(row["refinements"]) for row in rows), "exact",
    ]  # fmt: skip


@pytest.mark.parametrize("spread", [0.0, 0.01, 0.3])
def test_no_two_labels_of_the_bias_cover_each_other(tables, spread):
    one = next(row for row in tables["shifting"] if row["model"] == "adaptive")
    rows = [one | {"half": half, "bias": bias, "mean_steps": 1 + spread * bias, "own": bias == 0}
            for half in ("easy", "hard") for bias in (-4.0, -2.0, -1.0, 0.0, 1.0, 2.0, 4.0)]  # fmt: skip
    figure = FIGURES["shifting"][1](rows)
    FigureCanvasAgg(figure).draw()
    boxes = [text.get_window_extent() for text in figure.axes[0].texts]
    assert not any(box.overlaps(other) for index, box in enumerate(boxes) for other in boxes[:index])
    shown = " ".join(text.get_text() for text in figure.axes[0].texts).replace("\N{MINUS SIGN}", "-")
    assert re.findall(r"-?\d+", shown) == ["-4", "-2", "-1", "0", "1", "2", "4"]


def test_axes_say_what_they_show(tables):
    for name, (caption, figure_of) in FIGURES.items():
        figure = figure_of(tables[name])
        assert caption
        assert any(rule in figure.get_suptitle() for rule in ("hard, jacobi(1)", "hard, jacobi(R)", "soft mask")), name
        for axes in figure.axes:
            assert axes.get_xlabel()
        assert figure.axes[0].get_ylabel()


def test_only_what_there_are_rows_for(tables, tmp_path):
    vanilla = [row for row in tables["quality_compute"] if row["model"] == "vanilla"]
    assert list(draw({"quality_compute": vanilla, "tokens": tables["tokens"]}, tmp_path)) == ["quality_compute"]
    assert {path.name for path in tmp_path.iterdir()} == {"quality_compute.png", "quality_compute.svg"}


def test_rows_of_different_columns(tmp_path):
    write_rows([{"a": 1, "b": "x,y"}, {"a": 2, "c": 0.1}], tmp_path / "rows.csv")
    with (tmp_path / "rows.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows == [{"a": "1", "b": "x,y", "c": ""}, {"a": "2", "b": "", "c": "0.1"}]


def test_random_draws_that_are_all_the_same(tables):
    """Where the mean of equal losses is rounded up or down, a bar gets no negative length."""
    one = next(row for row in tables["quality_compute"] if row["sweep"] == "random")
    for loss in (0.7, 1.1, 2.3, 3.1):
        rows = [row for row in tables["quality_compute"] if row["sweep"] != "random"]
        FIGURES["quality_compute"][1]([*rows, *[one | {"loss": loss}] * 7])
