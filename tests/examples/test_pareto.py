"""The comparison of modes: its configurations are right, and its table says what was measured."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from megatron_ponder.runs.style import COLOURS
from tests import REPOSITORY
from tests.models import random_tokens

PARETO = REPOSITORY / "examples" / "pareto"


@pytest.mark.parametrize("size", ["cpu", "gpu", "paper", "diagnostic", "depths", "permutations"])
def test_a_dry_run_checks_every_run_and_starts_nothing(size, tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(PARETO)
    from pareto import main

    (tmp_path / "data").mkdir()
    main(["--size", size, "--output", str(tmp_path), "--dry-run", "--seeds", "0", "7"])
    chosen = yaml.safe_load((PARETO / "variants.yaml").read_text())
    own = chosen["all"] | chosen.get(size, chosen["text"])
    variants = [name for name, values in own.items() if values is not None]
    printed = capsys.readouterr().out.splitlines()
    lines = [line for line in printed if not line.startswith("#")]
    pieces = [float(line.split()[3]) for line in printed if line.startswith("# piece")]
    assert bool(pieces) == (size == "gpu")
    assert all(0 < minutes <= 8 for minutes in pieces)
    assert len(lines) == 2 * len(variants)
    assert sum("--training.seed 7" in line for line in lines) == len(variants)
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


@pytest.mark.parametrize("size", ["cpu", "diagnostic"])
def test_ways_of_training_more_cheaply_are_right_too(size, tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(PARETO)
    from pareto import main

    main(["--size", size, "--output", str(tmp_path), "--compare", "costs", "--dry-run", "--seeds", "0"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(yaml.safe_load((PARETO / "costs.yaml").read_text())[size])
    with pytest.raises(SystemExit) as refused:
        main(["--size", "gpu", "--output", str(tmp_path), "--compare", "costs", "--dry-run"])
    assert refused.value.code == 2
    assert "costs.yaml has no variants of size gpu; it has cpu, diagnostic" in capsys.readouterr().err


def test_what_training_cost_is_added_up_and_compared_within_a_seed(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(PARETO)
    from costs import write_costs

    runs, folders = written_runs(tmp_path)
    table = write_costs(runs, folders, tmp_path)
    _, _, first, second = ([cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines())
    assert first == ["vanilla", "5.000 ± 0.000", "", "0.00", "4.00", "1.00", "5", "1.00"]
    assert second == ["adaptive", "4.050 ± 0.071", "-0.950 ± 0.071", "1.00", "6.00", "1.50", "5", "1.00"]
    assert (tmp_path / "table.md").read_text() == table
    assert len((tmp_path / "table.csv").read_text().splitlines()) == 5


def test_runs_are_cut_into_pieces_that_go_on_from_each_other(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(PARETO)
    import pieces
    from runs import Run

    class Trained(Run):
        finished = False

    runs = [Trained(name, 0, (), tmp_path / name) for name in "abcde"]
    assert [[run.variant for run in piece] for piece in pieces.cut(runs, [3, 3, 2, 9, 1], 8)] == [
        [*"abc"],
        ["d"],
        ["e"],
    ]
    clock, done = iter([0.0, 3.0, 6.0, 0.0]), []
    monkeypatch.setattr(pieces.time, "monotonic", lambda: next(clock))
    assert pieces.train_for(runs, [3, 3, 3, 3, 3], 8, 1, lambda chosen, _: done.extend(chosen)) == 3
    assert [run.variant for run in done] == ["a", "b"]
    monkeypatch.setattr(Trained, "finished", True)
    assert pieces.train_for(runs, [3, 3, 3, 3, 3], 8, 1, lambda chosen, _: done.extend(chosen)) == 0
    assert len(done) == 2


def test_only_what_is_missing_is_measured_of_generation(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(PARETO)
    import generation_times
    from runs import Run

    shutil.copytree(
        REPOSITORY / "examples" / "diagnostic" / "model", tmp_path / "run" / "checkpoints" / "step-00000001"
    )
    given = {"adaptive": (), "adaptive-identity": ("--ponder.router_input", "token")}
    runs = [Run(variant, 0, arguments, tmp_path / "run") for variant, arguments in given.items()]
    prompts = SimpleNamespace(batches=[random_tokens(2, 9)])
    monkeypatch.setattr(generation_times, "split_batches", lambda *_: prompts)
    monkeypatch.setattr(generation_times, "GENERATED", 3)
    path = tmp_path / "generation.jsonl"
    (first,) = generation_times.measure_generation(runs, path, 1).items()
    assert first[0] == ("adaptive", 0)
    assert first[1] > 0
    monkeypatch.setattr(generation_times, "_seconds", lambda loaded: 3 * first[1])
    assert generation_times.measure_generation(runs, path, 3) == {("adaptive", 0): 3 * first[1]}
    measured = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["seconds"] for line in measured] == [first[1], 3 * first[1], 3 * first[1]]
    assert generation_times.measure_generation(runs, path, 1) == dict([first])
    assert generation_times.measure_generation(runs, path, 0) == {}


def test_refinements_are_averaged_over_seeds(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(PARETO)
    from refinement_tables import write_refinements

    folders = {seed: tmp_path / f"seed{seed}" for seed in (0, 1)}
    assert write_refinements(folders, tmp_path) == ""
    for seed, folder in folders.items():
        folder.mkdir()
        rows = ["model,mode,rule,refinements,trained,loss,exact_loss,gap"]
        rows += [f"fixed-seed{seed},fixed,hard,{r},{r == 2},{3.0 - r + seed},{1.5 + seed},0" for r in (0, 2)]
        (folder / "refinements.csv").write_text("\n".join(rows) + "\n")
    heading, _, line = write_refinements(folders, tmp_path).splitlines()
    assert heading == "| variant | R = 0 | R = 2 | exact |"
    assert line == "| fixed | 3.500 ± 0.707 | 1.500 ± 0.707 | 2.000 ± 0.707 |"
    assert (tmp_path / "refinements.png").read_bytes().startswith(b"\x89PNG")


def written_runs(tmp_path: Path) -> tuple[list, dict[int, Path]]:
    """Runs of two variants with their metrics, and the analyses of two seeds."""
    from runs import Run

    folders = {seed: tmp_path / f"seed{seed}" for seed in (0, 1)}
    runs = []
    for seed, folder in folders.items():
        write_analysis(folder, seed, shift=0.1 * seed)
        for variant, flops in (("vanilla", 2e12), ("adaptive", 3e12)):
            run = Run(variant, seed, (), tmp_path / f"{variant}-{seed}")
            run.folder.mkdir()
            records = [{"step": step, "model_flops": flops, "step_seconds": 2.0 + seed} for step in (1, 2)]
            (run.folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
            runs.append(run)
    return runs, folders


def summary(loss: float, steps: float, **more) -> dict:
    return {"loss": loss, "mean_steps": steps, "threshold": None, **more}


def write_analysis(folder: Path, seed: int, shift: float) -> None:
    """Three models of which vanilla and fixed differ by one nat, and adaptive lies halfway in compute."""
    gaps = [
        {"of": "hard, exact", "threshold": 1e-4, "loss": -0.002},
        {"of": "hard, jacobi(3)", "threshold": 1e-4, "loss": 0.001 + shift},
        {"of": "hard, jacobi(3)", "threshold": 0.1, "loss": 9.0},
    ]
    adaptive = summary(4.0 + shift, 1.0, difficulty={"rank_correlation": 0.25}, gaps=gaps, contraction={"factor": 0.4})
    models = {
        "vanilla": summary(5.0, 0.0),
        "fixed-1": summary(4.6, 1.0),
        "fixed": summary(4.0, 2.0),
        "adaptive": adaptive | {"threshold": 0.1},
    }
    folder.mkdir()
    (folder / "analysis.json").write_text(
        json.dumps(
            {"models": {f"{name}-seed{seed}": model | {"mode": name.split("-")[0]} for name, model in models.items()}}
        )
    )
    rows = ["model,sweep,threshold,loss,mflops,mean_steps"]
    exits = (("entropy,0", 4.0, 3.4, 2.0), ("entropy,1", 4.2 + shift, 2.0, 1.0), ("entropy,9", 6.0, 1.0, 0.0))
    exits += (("margin,0.9", 4.1, 2.9, 1.8), ("margin,0.5", 4.4, 1.7, 0.5))
    rows += [f"fixed-seed{seed},{exit},{loss},{mflops},{steps}" for exit, loss, mflops, steps in exits]
    rows += [
        f"{name}-seed{seed},trained,,0,{mflops}" for name, mflops in (("vanilla", 1), ("fixed-1", 2), ("fixed", 3))
    ]
    rows += [f"adaptive-seed{seed},threshold,0.1,0,1.5", f"adaptive-seed{seed},random,0.1,4.2,1.5"]
    rows += [f"adaptive-seed{seed},threshold,0.5,0,1.1", f"adaptive-seed{seed},random,0.5,7,1.1"]
    (folder / "quality_compute.csv").write_text("\n".join(rows) + "\n")


def test_depths_are_averaged_over_seeds(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(PARETO)
    from tables import write_tables

    folders = {seed: tmp_path / f"seed{seed}" for seed in (0, 1)}
    for seed, folder in folders.items():
        write_analysis(folder, seed, shift=0.0)
        measured = [("", 3.0, 0.25), (0, 0.5, 0.0), (1, 1.0 + seed, 2.0 - seed)]
        rows = [f"adaptive-seed{seed},{depth},{loss},{steps}" for depth, loss, steps in measured]
        (folder / "depth.csv").write_text("\n".join(["model,depth,loss,mean_steps", *rows]) + "\n")
    table = write_tables(folders, tmp_path)
    assert table.endswith((tmp_path / "depths.md").read_text())
    heading, _, line = (tmp_path / "depths.md").read_text().splitlines()
    assert heading == "| variant | loss, depth 0 | loss, depth 1 | K̂, depth 0 | K̂, depth 1 | K̂, no answer |"
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells == ["adaptive", "0.500 ± 0.000", "1.500 ± 0.707", "0.00 ± 0.00", "1.50 ± 0.71", "0.25 ± 0.00"]


def test_the_table_compares_at_equal_compute_over_seeds(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(PARETO)
    from tables import write_tables

    folders = {seed: tmp_path / f"seed{seed}" for seed in (0, 1)}
    for seed, folder in folders.items():
        write_analysis(folder, seed, shift=0.1 * seed)
    table = write_tables(folders, tmp_path)
    (line,) = [line for line in table.splitlines() if line.startswith("| adaptive ")]
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    # At 1.5 MFLOPs the curve through vanilla and fixed-1 is at 4.8.
    assert cells[1:6] == ["4.050 ± 0.071", "1.00", "1.50", "-0.750 ± 0.071", ""]
    assert cells[6:] == ["-0.150 ± 0.071", "0.250 ± 0.000", "0.00200", "0.10100", "0.40 ± 0.00"]
    # Between the thresholds that take less and more; an exit by margin takes more than that with all of its own.
    exits = {line.split("|")[1].strip(): line.split("|")[2:5] for line in table.splitlines() if "| fixed-" in line}
    assert [cell.strip() for cell in exits["fixed-entropy"]] == ["5.125 ± 0.035", "0.50", "1.50"]
    assert [cell.strip() for cell in exits["fixed-margin"]] == ["4.400 ± 0.000", "0.50", "1.70"]
    assert (tmp_path / "table.md").read_text() == table
    assert len((tmp_path / "table.csv").read_text().splitlines()) == 13


def test_a_mode_has_one_colour_and_a_line_through_its_variants_and_no_name_covers_another(monkeypatch):
    monkeypatch.syspath_prepend(PARETO)
    import loss_figures

    places = {
        "vanilla": (2.9, 0.5), "fixed": (2.7, 1.0), "fixed-2": (2.6, 1.5), "adaptive": (2.71, 1.0),
        "adaptive-lambda-0.05": (2.7, 1.01), "adaptive-identity": (2.75, 0.9), "pause": (9.0, 1.0),
    }  # fmt: skip
    runs = {
        name: loss_figures.Measured(loss, name.split("-")[0], {"pareto": 1e6 * mflops})
        for name, (loss, mflops) in places.items()
    }
    figure = loss_figures.draw([runs], loss_figures.COSTS[0], modes=True)
    (axes,) = figure.axes
    lines = {line.get_label(): line for line in axes.lines}
    through = {
        mode: list(zip(line.get_ydata(), line.get_xdata(), strict=True))
        for mode, line in lines.items()
        if mode in COLOURS
    }
    assert through["fixed"] == [places[name] for name in ("vanilla", "fixed", "fixed-2")]
    assert through["adaptive"] == [places[name] for name in ("adaptive", "adaptive-lambda-0.05")]
    names = [text for text in axes.texts if text.get_text()]
    colours = {text.get_text(): text.get_color() for text in names}
    assert colours == {name: COLOURS[name.split("-")[0]] for name in places if name != "pause"}
    assert figure.get_suptitle() == "one seed; above the frame: pause (9.00)"
    figure.canvas.draw()
    boxes = [text.get_window_extent() for text in names]
    assert not any(box.overlaps(other) for index, box in enumerate(boxes) for other in boxes[:index])
    points = axes.transData.transform([place[::-1] for place in places.values()])
    assert not any(box.count_contains(points) for box in boxes)
    assert all(axes.bbox.contains(*corner) for box in boxes for corner in (box.min, box.max))


def test_every_cost_has_a_figure(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(PARETO)
    from loss_figures import COSTS, write_figures

    runs, folders = written_runs(tmp_path)
    write_figures(runs, folders, {("vanilla", 0): 0.1, ("vanilla", 1): 0.2}, tmp_path, modes=True)
    for cost in COSTS:
        assert (tmp_path / f"{cost.name}.png").read_bytes().startswith(b"\x89PNG")
        assert ("adaptive" in (tmp_path / f"{cost.name}.svg").read_text()) == (cost.name != "generation_time")
