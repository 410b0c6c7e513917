"""Pictures of runs, drawn without a display."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from megatron_ponder.base.files import replacing
from megatron_ponder.runs.metrics import names_of, of_steps, read_metrics
from megatron_ponder.runs.style import COLOURS, FURTHER_MARKERS, STYLE

TRAINING, VALIDATION, PRUNED = COLOURS["pause"], COLOURS["fixed"], "#000000"
# Record of training, record of validation, and what the axis says, of every run …
CURVES = (
    ("cross_entropy", "validation_loss", "loss [nats per token]"),
    ("mean_latent_steps", "validation_mean_latent_steps", "executed latent steps per token"),
    ("grad_norm", None, "gradient norm"),
    ("learning_rate", None, "learning rate"),
)
# … and panels of a run with a router besides.
OWN_LOSSES = "loss above that of validation [nats]"
SHARES = "share of tokens that execute k latent steps"


def plot_training(run_dir: Path) -> Path:
    """Draw loss, executed steps, gradient norm and learning rate of a run from its metrics.

    With a router, also what each step predicts by itself, and how many tokens execute how many steps.

    Returns:
        The picture, `training.png` in the run's folder.
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    records = read_metrics(run_dir)
    routed = [record for record in records if "validation_own_losses" in record]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(15 if routed else 10, 6), layout="constrained")
        FigureCanvasAgg(figure)
        panels = figure.subplots(2, 3 if routed else 2, sharex=True)
        for axes, (training, validation, label) in zip(panels[:, :2].flat, CURVES, strict=True):
            _curve(axes, records, training, validation)
            axes.set_ylabel(label)
        panels[0, 0].legend()
        panels[0, 1].set_ylim(bottom=0)
        if routed:
            _own_losses(panels[0, 2], routed)
            _shares(panels[1, 2], records)
        for axes in panels.flat:
            axes.grid(alpha=0.3)
        for axes in panels[1]:
            axes.set_xlabel("optimiser step")
        figure.suptitle(run_dir.name)
        path = run_dir / "training.png"
        with replacing(path) as aside:
            figure.savefig(aside, dpi=120)
    return path


def _curve(axes, records: Sequence[dict], training: str, validation: str | None) -> None:
    """Draw a number of every step, and the same in validations, a curve for each set."""
    taken = of_steps(records)
    steps = [record["step"] for record in taken]
    axes.plot(steps, [record[training] for record in taken], linewidth=0.8, color=TRAINING, label="training")
    if validation is None:
        return
    curves = {"validation": (validation, {"marker": "o", "color": VALIDATION})}
    curves |= {name: (f"{validation}/{name}", look) for name, look in _looks_of_sets(names_of(validation, records))}
    for label, (field, look) in curves.items():
        validated = [record for record in records if field in record]
        if validated:
            values = [record[field] for record in validated]
            axes.plot([record["step"] for record in validated], values, markersize=3, label=label, **look)


def _own_losses(axes, records: Sequence[dict]) -> None:
    """Draw what each latent step predicts by itself, and the pruned model, above or below the validation loss."""
    at = [record["step"] for record in records]

    def above(values: Sequence[float | None]) -> list[float | None]:
        pairs = zip(values, (record["validation_loss"] for record in records), strict=True)
        return [None if value is None or loss is None else value - loss for value, loss in pairs]

    for k, style in enumerate(_looks_of_steps(len(records[-1]["validation_own_losses"]))):
        losses = above([record["validation_own_losses"][k] for record in records])
        axes.plot(at, losses, label=f"h{k} by itself", **style)
    pruned = above([record["validation_pruned_loss"] for record in records])
    axes.plot(at, pruned, "x:", color=PRUNED, markersize=6, linewidth=0.8, label="pruned")
    axes.axhline(0, color=VALIDATION, linewidth=0.8)
    axes.set_ylabel(OWN_LOSSES)
    axes.legend()


def _shares(axes, records: Sequence[dict]) -> None:
    """Draw how many of the tokens execute k latent steps in training."""
    counted = {record["step"]: tokens for record in records if (tokens := record.get("latent_step_histogram"))}
    if not counted:
        return
    at, histograms = list(counted), list(counted.values())
    for k, style in enumerate(_looks_of_steps(len(histograms[-1]))):
        shares = [tokens[k] / max(1, sum(tokens)) for tokens in histograms]
        axes.plot(at, shares, label=f"k = {k}", **style | {"marker": "", "linewidth": 0.8})
    axes.set_ylabel(SHARES)
    axes.set_ylim(-0.02, 1.02)
    axes.legend()


def _looks_of_sets(names: Sequence[str]) -> Iterator[tuple[str, dict]]:
    """Each name of a validation set with a colour and a marker, which come again if there are many."""
    colours = [COLOURS[mode] for mode in ("adaptive", "vanilla", "loop", "ponderlm")]
    for number, name in enumerate(names):
        marker = FURTHER_MARKERS[number % len(FURTHER_MARKERS)]
        yield name, {"marker": marker, "color": colours[number % len(colours)], "linewidth": 0.8}


def _looks_of_steps(count: int) -> list[dict]:
    """Colours from dark to light, which differ in lightness too, and markers for steps 0 to `count` - 1."""
    from matplotlib import colormaps

    shades = colormaps["viridis"]
    markers = [FURTHER_MARKERS[k % len(FURTHER_MARKERS)] for k in range(count)]
    return [
        {"color": shades(0.9 * k / max(1, count - 1)), "marker": marker, "markersize": 5, "linewidth": 1.2}
        for k, marker in enumerate(markers)
    ]
