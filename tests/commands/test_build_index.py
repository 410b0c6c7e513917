"""What is built ahead is what a run reads, and a build that is killed is completed by the next."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from megatron_ponder.config import DataConfig, read_config
from megatron_ponder.data.dataset_writer import IndexedDatasetWriter
from megatron_ponder.data.mixture import open_mixture


@pytest.fixture(scope="module")
def prefix(tmp_path_factory) -> Path:
    """Some 150,000 samples of 4 tokens."""
    prefix = tmp_path_factory.mktemp("data") / "data"
    with IndexedDatasetWriter(prefix, np.dtype("<u2")) as writer:
        for number, length in enumerate(np.random.default_rng(0).integers(0, 61, 20_000)):
            writer.add_document(np.full(length, number))
    return prefix


def words(prefix: Path, *arguments: object) -> list[object]:
    """The words after the command's name."""
    run = ["--data.path", prefix, "--data.split", "9,1", "--data.sequence_length", 4, "--training.eval_samples", 5]
    return [*run, *arguments]


@pytest.fixture
def build(ponder):
    """Runs the command in this process."""
    return lambda *arguments: ponder("build-index", *words(*arguments))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.index")}


def test_the_tool_builds_what_a_run_reads(build, prefix, tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text(
        f"data:\n  cache_path: {tmp_path / 'cache'}\ntraining:\n  global_batch_size: 100\n  steps: 2000\n"
    )
    result = build(prefix, "--config", config)
    assert (result.code, result.err) == (0, "")
    data = read_config(["--config", str(config), *map(str, words(prefix))]).data
    train = open_mixture(data, 1234).samples["train"]
    epochs = -(-200_000 // train.samples_per_epoch)
    assert epochs == 2
    (row,) = [line for line in result.out.splitlines() if "train" in line]
    assert str(prefix) in row and f"{train.samples_per_epoch:,}" in row and f" {epochs} " in row
    built = contents(tmp_path / "cache")
    assert len(built) == epochs + 1
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").glob("*.index")}

    plain = open_mixture(DataConfig(str(prefix), split="9,1", sequence_length=4), 1234).samples
    samples = open_mixture(data, 1234).samples
    for position in range(0, 200_000, 997):
        np.testing.assert_array_equal(samples["train"][position], plain["train"][position])
    np.testing.assert_array_equal(samples["valid"][3], plain["valid"][3])
    assert build(prefix, "--config", config).code == 0
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").glob("*.index")} == times


@pytest.mark.slow
def test_kill_9_at_any_moment_leaves_nothing_that_the_next_build_would_believe(build, prefix, tmp_path):
    options = ("--training.global_batch_size", 100, "--training.steps", 4000)
    assert build(prefix, *options, "--data.cache_path", tmp_path / "whole").code == 0
    whole = contents(tmp_path / "whole")
    assert len(whole) > 2
    cache = tmp_path / "cache"
    killed = 0
    for moment in range(4):
        arguments = words(prefix, *options, "--data.cache_path", cache)
        command = [sys.executable, "-m", "megatron_ponder", "build-index", *map(str, arguments)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE)
        while not (cache.exists() and list(cache.glob("*.lock"))) and process.poll() is None:
            time.sleep(0.001)
        time.sleep(0.03 * moment)
        process.send_signal(signal.SIGKILL)
        killed += process.wait() == -signal.SIGKILL
        process.stdout.close()
        finished = {path.name: path.read_bytes() for path in cache.glob("*.index")}
        assert finished.items() <= whole.items()
    assert killed >= 2
    assert build(prefix, *options, "--data.cache_path", cache).code == 0
    assert contents(cache) == whole


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "data.cache_path is not set; add --data.cache_path with the folder that the run will use"),
        (["--data.path", "", "--data.cache_path", "x"], "data.path is empty; give the prefix"),
        (["--data.path", "no/such", "--data.cache_path", "{tmp}"], "no/such.bin does not exist"),
        (["--config", "no/such.yaml"], "there is no configuration file no/such.yaml"),
    ],
)
def test_what_it_says(build, prefix, tmp_path, arguments, message):
    result = build(prefix, *[argument.format(tmp=tmp_path) for argument in arguments])
    assert result.code == 2
    assert result.err.startswith("error: ") and message in result.err and result.err.count("\n") == 1


def test_every_phase_of_a_run_has_its_order_built(build, prefix, tmp_path):
    """What a phase reads of sequences of another length, beside what comes before it."""
    steps = ("--data.cache_path", tmp_path / "cache", "--training.global_batch_size", 10, "--training.steps", 40)
    result = build(prefix, *steps, "--training.phases", "[{first_step: 30, sequence_length: 8}]")
    assert (result.code, result.err) == (0, "")
    trained = [line for line in result.out.splitlines() if " train " in line]
    sizes = [open_mixture(DataConfig(str(prefix), split="9,1", sequence_length=length), 1234) for length in (4, 8)]
    for line, mixture in zip(trained, sizes, strict=True):
        assert f"{mixture.samples['train'].samples_per_epoch:,}" in line
    assert len(contents(tmp_path / "cache")) == 4
