"""Figures show the rows that lie beside them."""

import csv

import matplotlib.image
import pytest

from megatron_ponder.evaluation.figures import COLOURS, FIGURES, draw, write_rows
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
    wanted = [int(COLOURS[0][at : at + 2], 16) for at in (1, 3, 5)]
    assert (abs(pixels * 255 - wanted).max(-1) < 2).sum() > 50  # the first model's colour
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
            assert columns([row for row in tables["quality_compute"] if row["model"] == model], x, "loss") in drawn
    for name, panel, (x, y) in (
        ("benefit", 0, ("steps", "gain")),
        ("benefit", 1, ("steps", "first_loss")),
        ("difficulty", 0, ("first_loss", "mean_steps")),
        ("difficulty", 0, ("first_loss", "mean_steps_by_identity")),
        ("contraction", 0, ("refinements", "rmse")),
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


def test_axes_say_what_they_show(tables):
    for name, (caption, figure_of) in FIGURES.items():
        figure = figure_of(tables[name])
        assert caption
        assert any(rule in figure.get_suptitle() for rule in ("hard, jacobi(1)", "soft mask")), name
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
