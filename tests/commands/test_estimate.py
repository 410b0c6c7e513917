"""The command that estimates a run."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_ponder.config import read_config
from megatron_ponder.estimates.layout_table import describe_layout
from megatron_ponder.estimates.memory import memory_estimate
from megatron_ponder.estimates.rank import Rank
from megatron_ponder.parallel.mesh import Axis, Mesh

ROOT = Path(__file__).parents[2]
CONFIG = ["--config", "examples/configs/llama_410m.yaml"]
SMALLER = ["--training.micro_batch_size", "2"]


def estimate(*arguments) -> subprocess.CompletedProcess:
    command = [sys.executable, "tools/estimate.py", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)


def test_the_tables():
    done = estimate(*CONFIG, *SMALLER, "--gpu", "H100-SXM", "--nodes", 2, "--tokens", "30e9")
    assert done.returncode == 0, done.stderr
    config = read_config([*CONFIG, *SMALLER])
    table = describe_layout(config, Mesh(torch.device("cuda"), data=Axis(16)))
    assert table in done.stdout  # of memory, as training prints it
    shares = [float(line.split("│")[3].strip(" %")) for line in done.stdout.splitlines() if line.count("│") == 4]
    assert sum(shares[:-1]) == pytest.approx(100, abs=0.5)
    assert "hidden behind computation" in done.stdout
    assert "3e+10 tokens take" in done.stdout


def test_json():
    done = estimate(*CONFIG, *SMALLER, "--cluster", "examples/clusters/h100.yaml", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    memory = memory_estimate(Rank(read_config([*CONFIG, *SMALLER]), 32, 0, "cuda"))
    assert found["memory"] == {**vars(memory), "total": memory.total}
    assert found["fits"] is True
    assert found["usable_memory"] == pytest.approx(0.9 * 80e9)
    assert found["step_seconds"] == pytest.approx(sum(found["parts"].values()))
    assert found["gpu_hours"] == pytest.approx(found["days"] * 24 * 32)
    assert found["tokens"] == 50_000 * 256 * 2048
    assert 0.1 < found["mfu"] < 0.7


def test_what_does_not_fit_and_the_nearest_layout_that_does():
    done = estimate(*CONFIG, "--gpu", "A100-40GB", "--nodes", 1)
    assert done.returncode == 2
    assert "do not fit into" in done.stderr
    assert done.stderr.count("\n") == 1
    proposed = done.stderr.split("; add ")[1].split(", which needs")[0].split()
    assert estimate(*CONFIG, "--gpu", "A100-40GB", "--nodes", 1, *proposed).returncode == 0


def test_the_search():
    done = estimate(*CONFIG, "--gpu", "L40S", "--gpus", 16, "--search", "--top", 5)
    assert done.returncode == 0, done.stderr
    assert "2 nodes of 8 L40S" in done.stdout
    assert "layouts fit into the usable 40.2 of 44.7 GiB of a GPU" in done.stdout
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in done.stdout.splitlines() if line[:1] == "│"]
    assert [row[0] for row in rows] == ["1", "2", "3", "4", "5"]
    overrides = re.findall(r"(?m)^(\d): (.*)$", done.stdout)
    assert [number for number, _ in overrides] == ["1", "2", "3", "4", "5"]
    for row, (_, proposed) in ((rows[0], overrides[0]), (rows[-1], overrides[-1])):
        alone = json.loads(estimate(*CONFIG, "--gpu", "L40S", "--nodes", 2, *proposed.split(), "--json").stdout)
        assert alone["fits"]
        assert (f"{alone['tokens_per_second']:,.0f}", f"{alone['gpu_hours']:,.0f}") == (row[8], row[11])


def test_a_number_of_gpus():
    few = json.loads(estimate(*CONFIG, "--gpu", "H100-SXM", "--gpus", 4, "--json").stdout)
    many = json.loads(estimate(*CONFIG, "--gpu", "H100-SXM", "--gpus", 64, "--json").stdout)
    assert (few["ranks"], many["ranks"]) == (4, 64)
    assert many == json.loads(estimate(*CONFIG, "--gpu", "H100-SXM", "--nodes", 8, "--json").stdout)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpu", "H100"], "no GPU is known as H100"),
        (["--nodes", "2"], "--memory-gib is not known"),
        (["--gpu", "H200", "--tokens", "-1"], "give a positive number"),
        (["--gpu", "H200", "--parallel.tensr", "2"], "did you mean parallel.tensor?"),
        (["--gpu", "H200", "--nodes", "1250"], "set training.global_batch_size to"),
        (["--gpu", "H200", "--nodes", "1250", "--search"], "set training.global_batch_size to"),
        (["--gpu", "A10", "--nodes", "1", "--gpus-per-node", "1", "--model.hidden_size", "16384"], "no layout of this"),
        (["--cluster", "missing.yaml"], "missing.yaml"),
        (["--gpu", "H200", "--gpus", "12"], "12 GPUs do not fill nodes of 8; ask for 8 or 16"),
        (["--gpu", "H200", "--gpus", "0"], "--gpus is 0; give at least 1"),
        (["--gpu", "H200", "--gpus", "8", "--nodes", "2"], "give one of them"),
    ],
)
def test_what_cannot_be(arguments, message):
    done = estimate(*CONFIG, *arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_vocabulary_that_only_the_tokenizer_knows():
    done = estimate("--config", "examples/quickstart/adaptive.yaml", "--gpu", "H200")
    assert done.returncode == 2
    assert "add --model.vocab_size" in done.stderr
