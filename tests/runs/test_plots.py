"""A picture of a run, from the records that a run writes."""

import matplotlib.image
import pytest

from megatron_ponder.config import LoggingConfig
from megatron_ponder.runs.metrics import MetricsLog
from megatron_ponder.runs.plots import plot_training
from megatron_ponder.runs.style import COLOURS


def record(step: int, validated: bool) -> dict:
    """Fields as `training.trainer` writes them."""
    numbers = {
        "step": step,
        "loss": 6 / step,
        "cross_entropy": 6 / step,
        "grad_norm": 1 / step,
        "learning_rate": 1e-3,
        "mean_latent_steps": 2 - step / 50,
        "tokens_per_second": 1000.0,
    }
    return numbers | ({"validation_loss": 7 / step, "validation_mean_latent_steps": 1.5} if validated else {})


@pytest.mark.parametrize("validation", [True, False])
@pytest.mark.parametrize("steps", [0, 1, 50])
def test_a_picture_is_written(tmp_path, steps, validation):
    log = MetricsLog(tmp_path, LoggingConfig(tensorboard=False), 0)
    for step in range(1, steps + 1):
        log.write(record(step, validation and step % 10 == 0))
    log.close()
    path = plot_training(tmp_path)
    assert path == tmp_path / "training.png"
    pixels = matplotlib.image.imread(path)
    assert pixels.shape[:2] == (720, 1200)
    assert len(set(map(tuple, pixels[::7, ::7, :3].reshape(-1, 3).tolist()))) > 4  # more than a white sheet


def test_what_each_step_predicts_is_told_apart_and_not_under_the_validation_curve(tmp_path):
    log = MetricsLog(tmp_path, LoggingConfig(tensorboard=False), 0)
    for step in (1, 2, 3):
        validation = 7 / step
        own = [validation + 1e-3 * (k + 1) for k in range(3)]  # on the scale of the losses they would be one line
        losses = {
            "validation_own_losses": own,
            "validation_pruned_loss": validation,
            "latent_step_histogram": [1, 2, 1],
        }
        log.write(record(step, True) | losses)
    log.close()
    pixels = matplotlib.image.imread(plot_training(tmp_path))
    assert pixels.shape[:2] == (720, 1800)
    panel = (pixels[:360, 1250:, :3] * 255).round()
    rows = []
    for k in range(3):
        shade = [255 * value for value in matplotlib.colormaps["viridis"](0.45 * k)[:3]]
        drawn = (abs(panel - shade).max(-1) <= 2).nonzero()[0]
        assert len(drawn) > 200, k
        rows.append(sorted(drawn)[len(drawn) // 2])
    assert rows == sorted(rows, reverse=True), "a larger loss lies higher"
    assert min(rows[0] - rows[1], rows[1] - rows[2]) > 50


def test_what_is_not_finite_leaves_a_gap(tmp_path):
    log = MetricsLog(tmp_path, LoggingConfig(tensorboard=False), 0)
    for step in (1, 2, 3):
        lost = {"validation_loss": None, "cross_entropy": None, "latent_step_histogram": [0, 0, 0]} if step == 2 else {}
        losses = {
            "validation_own_losses": [9.0, None],
            "validation_pruned_loss": 8.0,
            "latent_step_histogram": [1, 2, 1],
        }
        log.write(record(step, True) | losses | lost)
    log.close()
    assert plot_training(tmp_path).is_file()


def test_every_validation_set_has_a_curve(tmp_path):
    """Also before the first step, where there is nothing of training yet."""
    log = MetricsLog(tmp_path, LoggingConfig(tensorboard=False), 0)
    named = {"validation_loss/code": 3.0, "validation_loss/prose": 5.0}
    log.complete(0, {"validation_loss": 8.0, "validation_mean_latent_steps": 1.5} | named)
    for step in (1, 2, 3):
        log.write(record(step, True) | named)
    log.close()
    pixels = (matplotlib.image.imread(plot_training(tmp_path))[:360, :600, :3] * 255).round()
    for colour in ("adaptive", "vanilla"):
        shade = [int(COLOURS[colour][at : at + 2], 16) for at in (1, 3, 5)]
        assert (abs(pixels - shade).max(-1) <= 2).sum() > 200, colour
