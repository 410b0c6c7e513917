"""Draw the schedules of the learning rate that `docs/training.md` shows: `python docs/learning_rates.py`."""

from pathlib import Path

from matplotlib import rc_context
from matplotlib.figure import Figure

from megatron_ponder.config import OptimizerConfig
from megatron_ponder.runs.style import COLOURS, STYLE
from megatron_ponder.training.schedules import learning_rate

IMAGE = Path(__file__).resolve().parent / "images" / "learning_rates.png"
STEPS, WARMUP, DECAY = 1000, 50, 200
PLAIN = {name: {"schedule": name} for name in ("cosine", "linear", "constant", "inverse_sqrt")}
FALLING = {
    shape: {"schedule": "wsd", "decay_steps": DECAY, "decay_shape": shape} for shape in ("linear", "1-sqrt", "cosine")
}


def main() -> None:
    """Draw one panel of schedules, and one of the ways in which `wsd` falls."""
    with rc_context(STYLE):
        figure = Figure(figsize=(8, 2.6), layout="constrained")
        panels = figure.subplots(1, 2, sharey=True)
        for axes, title, schedules in zip(panels, ("schedule", "wsd: decay_shape"), (PLAIN, FALLING), strict=True):
            for colour, (name, given) in zip(COLOURS.values(), schedules.items(), strict=False):
                config = OptimizerConfig(learning_rate=1.0, warmup_steps=WARMUP, **given)
                axes.plot([learning_rate(step, STEPS, config) for step in range(STEPS)], color=colour, label=name)
            axes.set(title=title, xlabel="optimiser step", ylim=(0, 1.05))
            axes.grid(alpha=0.3)
            axes.legend(loc="lower center", fontsize=8, ncols=2)
        panels[0].set_ylabel("learning rate / peak")
        figure.savefig(IMAGE, dpi=120)


if __name__ == "__main__":
    main()
