"""The command that estimates a run."""

import json
import re
from functools import partial

import pytest

from megatron_ponder.config import read_config
from megatron_ponder.estimates.layout_table import describe_layout
from megatron_ponder.estimates.memory import memory_estimate
from megatron_ponder.estimates.rank import Rank

CONFIG = ["--config", "examples/configs/llama_410m.yaml"]
SMALLER = ["--training.micro_batch_size", "2"]


@pytest.fixture
def estimate(ponder):
    """Runs the command in this process."""
    return partial(ponder, "estimate")


def test_the_tables(estimate):
    done = estimate(*CONFIG, *SMALLER, "--gpu", "H100-SXM", "--nodes", 2, "--tokens", "30e9")
    assert done.code == 0, done.err
    config = read_config([*CONFIG, *SMALLER])
    table = describe_layout(config, 16, "cuda")
    assert table in done.out  # of memory, as training prints it
    shares = [float(line.split("│")[3].strip(" %")) for line in done.out.splitlines() if line.count("│") == 4]
    assert sum(shares[:-1]) == pytest.approx(100, abs=0.5)
    assert "hidden behind computation" in done.out
    assert "3e+10 tokens take" in done.out


def test_json(estimate):
    done = estimate(*CONFIG, *SMALLER, "--cluster", "examples/clusters/h100.yaml", "--json")
    assert done.code == 0, done.err
    found = json.loads(done.out)
    memory = memory_estimate(Rank(read_config([*CONFIG, *SMALLER]), 32, 0, "cuda"))
    assert found["memory"] == {**vars(memory), "total": memory.total}
    assert found["fits"] is True
    assert found["usable_memory"] == pytest.approx(0.9 * 80e9)
    assert found["step_seconds"] == pytest.approx(sum(found["parts"].values()))
    assert found["gpu_hours"] == pytest.approx(found["days"] * 24 * 32)
    assert found["tokens"] == 50_000 * 256 * 2048
    assert 0.1 < found["mfu"] < 0.7


PHASES = ["--ponder_training.latent_start", "25000", "--ponder_training.prune_start", "40000"]


def test_the_phases_of_a_run(estimate):
    arguments = (*CONFIG, *SMALLER, *PHASES, "--gpu", "H100-SXM", "--nodes", 2, "--mean-latent-steps", 0.5)
    table = estimate(*arguments)
    assert table.code == 0, table.err
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in table.out.splitlines() if line[:1] == "│"]
    rows = [row for row in rows if len(row) == 6]
    assert [row[:2] for row in rows] == [
        ["tokens alone", "25,000"], ["latent steps", "15,000"], ["pruned to 0.50", "10,000"], ["together", "50,000"],
    ]  # fmt: skip
    found = json.loads(estimate(*arguments, "--json").out)
    assert f"{found['flops']:.3g}" == rows[-1][4]
    assert found["flops"] == sum(phase["steps"] * phase["step_flops"] for phase in found["phases"])
    seconds = sum(phase["steps"] * phase["step_seconds"] for phase in found["phases"])
    assert found["days"] == pytest.approx(seconds / 86400)
    whole = json.loads(estimate(*CONFIG, *SMALLER, "--gpu", "H100-SXM", "--nodes", 2, "--json").out)
    assert [phase["begin"] for phase in whole["phases"]] == [0]
    assert found["flops"] < 0.5 * whole["flops"]
    assert found["memory"] == whole["memory"]  # of steps that prune nothing


def test_what_does_not_fit_and_the_nearest_layout_that_does(estimate):
    done = estimate(*CONFIG, "--gpu", "A100-40GB", "--nodes", 1)
    assert done.code == 2
    assert "do not fit into" in done.err
    assert done.err.count("\n") == 1
    proposed = done.err.split("; add ")[1].split(", which needs")[0].split()
    assert estimate(*CONFIG, "--gpu", "A100-40GB", "--nodes", 1, *proposed).code == 0


def test_decoding(estimate):
    done = estimate(*CONFIG, "--gpu", "H100-SXM", "--decoding", "--memory-bandwidth-share", 1)
    assert done.code == 0, done.err
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in done.out.splitlines() if "│" in line]
    assert [row[0] for row in rows] == ["1", "16", "256"]
    assert [row[3] for row in rows] == ["0.23", "0.68", "7.89"]
    assert "two questions" in estimate(*CONFIG, "--gpu", "H100-SXM", "--decoding", "--search").err


def test_the_search(estimate):
    done = estimate(*CONFIG, "--gpu", "L40S", "--gpus", 16, "--search", "--top", 5)
    assert done.code == 0, done.err
    assert "2 nodes of 8 L40S" in done.out
    assert "layouts fit into the usable 40.2 of 44.7 GiB of a GPU" in done.out
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in done.out.splitlines() if line[:1] == "│"]
    assert [row[0] for row in rows] == ["1", "2", "3", "4", "5"]
    overrides = re.findall(r"(?m)^(\d): (.*)$", done.out)
    assert [number for number, _ in overrides] == ["1", "2", "3", "4", "5"]
    for row, (_, proposed) in ((rows[0], overrides[0]), (rows[-1], overrides[-1])):
        alone = json.loads(estimate(*CONFIG, "--gpu", "L40S", "--nodes", 2, *proposed.split(), "--json").out)
        assert alone["fits"]
        assert (f"{alone['tokens_per_second']:,.0f}", f"{alone['gpu_hours']:,.0f}") == (row[8], row[11])


def test_a_number_of_gpus(estimate):
    few = json.loads(estimate(*CONFIG, "--gpu", "H100-SXM", "--gpus", 4, "--json").out)
    many = json.loads(estimate(*CONFIG, "--gpu", "H100-SXM", "--gpus", 64, "--json").out)
    assert (few["ranks"], many["ranks"]) == (4, 64)
    assert many == json.loads(estimate(*CONFIG, "--gpu", "H100-SXM", "--nodes", 8, "--json").out)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpu", "H100"], "no GPU is known as H100"),
        (["--nodes", "2"], "--memory-gib is not known"),
        (["--gpu", "H200", "--tokens", "-1"], "tokens is -1; its range is 1 to 1e18"),
        (["--gpu", "H200", "--tokens", "nan"], "tokens is nan; its range is 1 to 1e18"),
        (["--gpu", "H200", "--tokens", "1e300"], "tokens is 1e300; its range is 1 to 1e18"),
        (["--gpu", "H200", "--decoding", "--mean-latent-steps", "0"], "two questions"),
        (["--gpu", "H200", "--parallel.tensr", "2"], "did you mean parallel.tensor?"),
        (["--gpu", "H200", "--nodes", "1250"], "set training.global_batch_size to"),
        (["--gpu", "H200", "--nodes", "1250", "--search"], "set training.global_batch_size to"),
        (["--gpu", "A10", "--nodes", "1", "--gpus-per-node", "1", "--model.hidden_size", "16384"], "no layout of this"),
        (["--cluster", "missing.yaml"], "missing.yaml"),
        (["--gpu", "H200", "--gpus", "12"], "12 GPUs do not fill nodes of 8; ask for 8 or 16"),
        (["--gpu", "H200", "--gpus", "0"], "gpus is 0; its range is 1 to 10,000,000"),
        (["--gpu", "H200", "--mean-latent-steps", "1"], "this one runs all; set ponder_training.prune_start"),
        (["--gpu", "H200", *PHASES, "--mean-latent-steps", "4"], "give a number from 0 to latent_steps, 3"),
        (["--gpu", "H200", "--gpus", "8", "--nodes", "2"], "give one of them"),
    ],
)
def test_what_cannot_be(estimate, arguments, message):
    done = estimate(*CONFIG, *arguments)
    assert done.code == 2
    assert message in done.err
    assert done.err.count("\n") == 1


def test_a_vocabulary_that_only_the_tokenizer_knows(estimate):
    done = estimate("--config", "examples/quickstart/adaptive.yaml", "--gpu", "H200")
    assert done.code == 2
    assert "add --model.vocab_size" in done.err


IN_TWO = "[{first_step: 30000, sequence_length: 4096, global_batch_size: 128, micro_batch_size: 1}]"


def test_every_phase_of_a_run_has_its_tables(estimate):
    """Steps of half as many sequences that are twice as long, and all that both take together."""
    machine = ("--gpu", "H100-SXM", "--nodes", 2)
    done = estimate(*CONFIG, *SMALLER, *machine, "--training.phases", IN_TWO)
    assert done.code == 0, done.err
    found = json.loads(estimate(*CONFIG, *SMALLER, *machine, "--training.phases", IN_TWO, "--json").out)
    whole = json.loads(estimate(*CONFIG, *SMALLER, *machine, "--json").out)
    steps = [sum(part["steps"] for part in phase["phases"]) for phase in found]
    assert steps[0] == 30000 and sum(steps) == sum(part["steps"] for part in whole["phases"])
    assert sum(phase["tokens"] for phase in found) == whole["tokens"]
    assert found[0]["step_seconds"] == whole["step_seconds"] < found[1]["step_seconds"]
    assert sum(phase["flops"] for phase in found) > whole["flops"]  # of longer attention
    assert f"steps 30,000 to {sum(steps):,.0f}:" in done.out
    assert f"together {sum(phase['days'] for phase in found):,.2f} days, " in done.out


@pytest.mark.parametrize("option", [["--search"], ["--tokens", "1e9"]])
def test_what_is_of_one_phase_is_not_asked_of_several(estimate, option):
    done = estimate(*CONFIG, *SMALLER, "--gpu", "H100-SXM", "--nodes", 2, "--training.phases", IN_TWO, *option)
    assert done.code == 2 and f"{option[0]} " in done.err and "training.phases has several" in done.err


def test_a_phase_that_does_not_fit_is_refused(estimate):
    long = "[{first_step: 30000, sequence_length: 1048576, global_batch_size: 16, micro_batch_size: 1}]"
    done = estimate(*CONFIG, *SMALLER, "--gpu", "H100-SXM", "--nodes", 2, "--training.phases", long)
    assert (done.code == 2 and "do not fit into" in done.err) or "no layout of this model fits" in done.err
