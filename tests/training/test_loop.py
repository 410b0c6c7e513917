"""The training loop as a whole."""

import gc
import multiprocessing

from megatron_ponder.config import read_config
from megatron_ponder.parallel.mesh import Mesh
from megatron_ponder.training.trainer import train
from tests.distributed import run_distributed
from tests.finished_runs import alone, tiny_arguments


def processes_after_training(mesh: Mesh, arguments: list[str]) -> int:
    """Processes left, while garbage that might hold them has not been collected."""
    gc.disable()
    train(read_config(arguments), mesh.device)
    left = multiprocessing.active_children()
    for process in left:
        process.kill()
    return len(left)


def test_processes_that_read_ahead_end_with_training(corpus, tmp_path):
    """They ignore signals: one that is left would keep the finished run from ending, for ever."""
    arguments = tiny_arguments(corpus, tmp_path / "run", training__steps=3, data__num_workers=1)
    assert run_distributed(processes_after_training, 1, arguments) == [0]


def test_a_run_without_validation_says_so(corpus, tmp_path):
    """`training.eval_interval` has a default, so that nobody has said that there is none."""
    arguments = tiny_arguments(corpus, tmp_path / "run", training__steps=1, data__split="1,0,0")
    with alone() as device:
        train(read_config(arguments), device)
    log = (tmp_path / "run" / "train.log").read_text()
    assert "no validation, because data.split leaves nothing for it\n" in log
