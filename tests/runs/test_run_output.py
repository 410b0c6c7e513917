"""What a run tells while it trains: everything on the first rank, and nothing on others."""

from pathlib import Path

import pytest

from megatron_ponder.base.errors import UserError
from megatron_ponder.config import Config
from megatron_ponder.runs.metrics import read_metrics
from megatron_ponder.runs.run_folder import RunFolder
from megatron_ponder.runs.run_log import RUN_LOG
from megatron_ponder.runs.run_output import RunOutput, Silence
from megatron_ponder.runs.starts import read_end, read_starts
from tests.models import small_config
from tests.runs.records import record

CURVES = {"cross_entropy": 6.0, "grad_norm": 1.0, "learning_rate": 0.1}


def config_for(run_dir: Path) -> Config:
    return small_config(training__run_dir=run_dir, training__steps=3, logging__tensorboard="false", logging__interval=1)


def test_the_first_rank_tells_it_to_every_file_and_to_the_terminal(tmp_path, capsys):
    with RunFolder(tmp_path, "") as folder, RunOutput(folder, config_for(tmp_path), 0, ranks=2) as output:
        output.say("starting")
        output.note("for the log alone")
        output.record(record(1, **CURVES))
        output.complete(1, {"validation_loss": 4.0, "validation_mean_latent_steps": 1.0})
        output.check_folder()
        output.draw()
    shown, log = capsys.readouterr().out, (tmp_path / RUN_LOG).read_text()
    for line in ("starting", "step 1/3  loss 6.0000", "loss plot in"):
        assert line in shown and line in log
    assert "for the log alone" in log and "for the log alone" not in shown
    assert read_metrics(tmp_path) == [record(1, **CURVES, validation_loss=4.0, validation_mean_latent_steps=1.0)]
    assert [start["ranks"] for start in read_starts(tmp_path)] == [2]
    assert read_end(tmp_path)["reason"] == "finished"


def test_losses_before_this_start_are_known_and_how_it_ends_is_noted(tmp_path):
    config = config_for(tmp_path)
    with RunFolder(tmp_path, "") as folder:
        with RunOutput(folder, config, 0, ranks=1) as output:
            output.complete(0, {"validation_loss": 8.0})
            for step in (1, 2, 3):
                output.record(record(step))
        output = RunOutput(folder, config, 2, ranks=1)
        assert output.losses == [6.0, 5.0]
        with pytest.raises(UserError), output:
            raise UserError("too bad")
    assert read_end(tmp_path)["reason"] == "UserError: too bad"
    assert "stopped: UserError: too bad" in (tmp_path / RUN_LOG).read_text()


def test_other_ranks_are_silent(capsys):
    with Silence() as output:
        output.say("starting")
        output.record(record(1))
        output.draw()
    assert capsys.readouterr() == ("", "")
    assert list(output.losses) == []
