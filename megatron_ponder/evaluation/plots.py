"""Pictures of runs, drawn without a display."""

from pathlib import Path

from megatron_ponder.training.metrics import read_metrics


def plot_training(run_dir: Path) -> Path:
    """Draw loss, executed steps, gradient norm and learning rate of a run from its metrics.

    Returns:
        The picture, `training.png` in the run's folder.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    records = read_metrics(run_dir)
    steps = [record["step"] for record in records]
    validated = [record for record in records if "validation_loss" in record]
    figure = Figure(figsize=(10, 6), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(2, 2, sharex=True)
    curves = {
        "cross_entropy": "loss [nats per token]",
        "mean_steps": "executed additional steps per token",
        "grad_norm": "gradient norm",
        "learning_rate": "learning rate",
    }
    for axes, (key, label) in zip(panels.flat, curves.items(), strict=True):
        axes.plot(steps, [record[key] for record in records], linewidth=0.8, label="training")
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
    if validated:
        at = [record["step"] for record in validated]
        for axes, key in ((panels[0, 0], "validation_loss"), (panels[0, 1], "validation_mean_steps")):
            axes.plot(at, [record[key] for record in validated], "o-", markersize=3, label="validation")
    own = [record for record in validated if "validation_own_losses" in record]
    if own:
        pruned = [record["validation_pruned_loss"] for record in own]
        panels[0, 0].plot([record["step"] for record in own], pruned, "x", markersize=5, label="validation, pruned")
    for k in range(len(own[-1]["validation_own_losses"]) if own else 0):
        losses = [record["validation_own_losses"][k] for record in own]
        panels[0, 0].plot([record["step"] for record in own], losses, "--", linewidth=0.8, label=f"step {k} by itself")
    panels[0, 0].legend()
    panels[0, 1].set_ylim(bottom=0)
    for axes in panels[1]:
        axes.set_xlabel("optimiser step")
    figure.suptitle(run_dir.name)
    path = run_dir / "training.png"
    figure.savefig(path, dpi=120)
    return path
