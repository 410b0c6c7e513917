"""What a run writes about itself."""

import json

import pytest

from megatron_ponder.config import LoggingConfig
from megatron_ponder.runs.metrics import METRICS, MetricsLog, names_of, of_steps, read_metrics
from tests.runs.records import record

PLAIN = LoggingConfig(tensorboard=False)


def write(run_dir, steps, first_step=0, config=PLAIN, **more):
    log = MetricsLog(run_dir, config, first_step)
    for step in steps:
        log.write(record(step, **more))
    log.close()


def steps_of(run_dir) -> list[int]:
    return [entry["step"] for entry in read_metrics(run_dir)]


def test_records_come_back_as_they_were_written(tmp_path):
    write(tmp_path, [1], latent_step_histogram=[3, 4, 5])
    assert read_metrics(tmp_path) == [record(1, latent_step_histogram=[3, 4, 5])]
    line = (tmp_path / METRICS).read_text()
    assert line.endswith("}\n")
    assert json.loads(line)["step"] == 1


def test_every_record_is_on_disk_at_once(tmp_path):
    log = MetricsLog(tmp_path, PLAIN, 0)
    log.write(record(1))
    assert steps_of(tmp_path) == [1]
    log.close()


def test_records_after_the_resumed_step_are_dropped(tmp_path):
    write(tmp_path, range(1, 8))
    write(tmp_path, [5, 6], first_step=4, again=True)
    assert steps_of(tmp_path) == [1, 2, 3, 4, 5, 6]
    assert ["again" in entry for entry in read_metrics(tmp_path)] == [False] * 4 + [True] * 2
    write(tmp_path, [1])
    assert steps_of(tmp_path) == [1]
    assert [path.name for path in tmp_path.iterdir()] == [METRICS]


def test_a_validation_before_the_first_step_has_a_record_of_its_own(tmp_path):
    for again in (False, True):
        log = MetricsLog(tmp_path, PLAIN, 0)  # which begins anew
        log.complete(0, {"validation_loss": 7.0, "validation_loss/code": 6.0})
        log.write(record(1, again=again))
        log.close()
    first = {"step": 0, "validation_loss": 7.0, "validation_loss/code": 6.0}
    assert read_metrics(tmp_path) == [first, record(1, again=True)]
    assert of_steps(read_metrics(tmp_path)) == [record(1, again=True)]
    assert names_of("validation_loss", read_metrics(tmp_path)) == ["code"]
    write(tmp_path, [2], first_step=1)
    assert steps_of(tmp_path) == [0, 1, 2]


@pytest.mark.parametrize("kept", [1, 20, -2])
def test_a_last_line_cut_off_by_a_crash_is_left_out(tmp_path, kept):
    write(tmp_path, [1, 2, 3])
    path = tmp_path / METRICS
    whole, last = path.read_text().splitlines()[:2], path.read_text().splitlines()[2]
    path.write_text("\n".join([*whole, last[:kept]]))
    assert steps_of(tmp_path) == [1, 2]
    write(tmp_path, [3], first_step=2)
    assert steps_of(tmp_path) == [1, 2, 3]


def test_tensorboard_gets_the_numbers(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = LoggingConfig(tensorboard=True)
    write(tmp_path, [1, 2, 3], config=config, latent_step_histogram=[1, 2])
    write(tmp_path, [3, 4], first_step=2, config=config)
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert set(events.Tags()["scalars"]) == {"steps_left", "loss", "mean_latent_steps", "tokens_per_second"}
    losses = events.Scalars("loss")
    assert [(event.step, event.value) for event in losses] == [(1, 6.0), (2, 5.0), (3, 4.0), (4, 3.0)]


class FullDisk:
    """A file that takes so many bytes and no more."""

    def __init__(self, file, space: int) -> None:
        self._file, self.space = file, space

    def __getattr__(self, name):
        return getattr(self._file, name)

    def write(self, content: bytes) -> int:
        if content and self.space == 0:
            raise OSError(28, "No space left on device")
        written = self._file.write(content[: self.space])
        self.space -= written
        return written


def test_records_wait_for_space_on_a_full_disk(tmp_path, caplog):
    log = MetricsLog(tmp_path, PLAIN, 0)
    log.write(record(1))
    log._file._file = FullDisk(log._file._file, space=30)
    for step in (2, 3):
        log.write(record(step))
        assert steps_of(tmp_path) == [1]
        assert (tmp_path / METRICS).read_text().endswith("}\n"), "half a record"
    log._file._file.space = 10**6
    log.write(record(4))
    assert steps_of(tmp_path) == [1, 2, 3, 4]
    log.close()
    (warning,) = caplog.messages
    assert "cannot be written, and is kept in memory: No space left on device" in warning


def test_what_is_not_finite_is_null(tmp_path):
    write(tmp_path, [1], grad_norm=float("inf"), cross_entropy=float("nan"), own_losses=[1.5, float("nan")])
    assert read_metrics(tmp_path) == [record(1, grad_norm=None, cross_entropy=None, own_losses=[1.5, None])]


def test_the_record_before_a_start_can_be_completed(tmp_path):
    write(tmp_path, [1, 2])
    log = MetricsLog(tmp_path, PLAIN, 2)
    log.complete(2, {"validation_loss": 3.0})
    log.write(record(3))
    log.close()
    assert read_metrics(tmp_path) == [record(1), record(2, validation_loss=3.0), record(3)]


def test_records_of_before_are_read_under_the_names_of_now(tmp_path):
    old = {"step": 1, "mean_steps": 1.5, "validation_step_histogram": [1, 2], "steps_follow_loss": None}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(old) + "\n")
    new = {
        "step": 1,
        "mean_latent_steps": 1.5,
        "validation_latent_step_histogram": [1, 2],
        "latent_steps_follow_loss": None,
    }
    assert read_metrics(tmp_path) == [new]
    log = MetricsLog(tmp_path, LoggingConfig(tensorboard=False), 1)
    log.complete(1, {"validation_mean_latent_steps": 2.0})
    log.close()
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == new | {"validation_mean_latent_steps": 2.0}
