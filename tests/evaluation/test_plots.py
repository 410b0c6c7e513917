"""A picture of a run, from the records that a run writes."""

import matplotlib.image
import pytest

from megatron_ponder.config import LoggingConfig
from megatron_ponder.evaluation.plots import plot_training
from megatron_ponder.training.metrics import MetricsLog


def record(step: int, validated: bool) -> dict:
    """Fields as `training.trainer` writes them."""
    numbers = {
        "step": step,
        "loss": 6 / step,
        "cross_entropy": 6 / step,
        "grad_norm": 1 / step,
        "learning_rate": 1e-3,
        "mean_steps": 2 - step / 50,
        "tokens_per_second": 1000.0,
    }
    return numbers | ({"validation_loss": 7 / step, "validation_mean_steps": 1.5} if validated else {})


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


def test_a_router_adds_what_each_step_predicts(tmp_path):
    pictures = []
    for routed in (False, True):
        folder = tmp_path / "run"  # the picture has its name
        folder.mkdir(exist_ok=True)
        (folder / "metrics.jsonl").unlink(missing_ok=True)
        log = MetricsLog(folder, LoggingConfig(tensorboard=False), 0)
        for step in (1, 2, 3):
            losses = {"validation_own_losses": [9 / step, 8 / step], "validation_pruned_loss": 10 / step}
            log.write(record(step, True) | (losses if routed else {}))
        log.close()
        pictures.append(matplotlib.image.imread(plot_training(folder)))
    differing = (pictures[0] != pictures[1]).any(-1)
    assert differing[:360, :600].any(), "in the panel of losses"
    assert not differing[:, 600:].any()
