"""The benchmark of generation runs; what it measures is not a matter for tests."""

import os
import subprocess
import sys

import pytest
import torch

from benchmarks.generation import BATCH, PROMPT, Stream, build, calibrated, prompts
from megatron_ponder.generation.generate import generate
from tests import REPOSITORY


def test_a_stream_counts_the_work_of_its_forwards():
    model = build("vanilla", torch.device("cpu"))[0]
    stream = Stream(model, 2)
    blocks, head = 6 * (4 * 256**2 + 3 * 256 * 688 + 2 * 256) + 256, 8192 * 256
    cached = 2 * PROMPT * 6 * 2 * 256  # keys and values of both prompts
    assert stream.generator.cached_slots == 2 * PROMPT
    assert stream.work() == (4 * (blocks + head) + 2 * cached, 4 * (blocks + head + cached))


@pytest.mark.slow
def test_routers_take_about_as_many_steps_as_asked():
    model = build("adaptive", torch.device("cpu"))[0]
    results = generate(model, prompts(BATCH, PROMPT), 16, calibrated(model, 1.5))
    steps = [step for result in results for step in result.executed_steps[PROMPT:]]
    assert len(set(steps)) > 2
    assert 1.2 < sum(steps) / len(steps) < 1.8


@pytest.mark.slow
def test_it_measures():
    command = [sys.executable, str(REPOSITORY / "benchmarks" / "generation.py"), "--rounds", "1", "--threads", "1"]
    command += ["--prompt-tokens", "50"]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, result.stderr
    assert "rows in use while requests wait: " in result.stdout
    for title in ("adaptive over fixed", "one sequence and 16", "transformers' generate", "one prompt of 50 tokens"):
        assert title in result.stdout
