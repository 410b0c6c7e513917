"""What `ponder new` writes is a configuration that trains on the machine that it is for, and explains its keys."""

import itertools
import re
import shlex
from pathlib import Path

import pytest

from megatron_ponder.cluster.description import Cluster
from megatron_ponder.cluster.hardware import Hardware, hardware_of
from megatron_ponder.commands.ponder import COMMANDS
from megatron_ponder.config import Config, read_config
from megatron_ponder.config.documentation import entries, plain
from megatron_ponder.config.known_sizes import SIZES
from megatron_ponder.config.parsing import KEYS, SECTIONS
from megatron_ponder.estimates.new_run import parameters, this_processor
from megatron_ponder.estimates.search import check_ranks, fullest_memory

MACHINES = {
    "--cpu --memory-gib 32": this_processor(32),
    "--gpus 1 --memory-gib 24": hardware_of(Cluster(gpu="A10", gpus_per_node=1, memory_gib=24), "bf16"),
    "--gpu H100-SXM --gpus 8": hardware_of(Cluster(gpu="H100-SXM"), "bf16"),
    "--cluster examples/clusters/h100.yaml --nodes 4": hardware_of(Cluster(gpu="H100-SXM", nodes=4), "bf16"),
    "--gpu A100-40GB --nodes 3 --gpus-per-node 4": hardware_of(
        Cluster(gpu="A100-40GB", nodes=3, gpus_per_node=4), "bf16"
    ),
}
# Too large for these.
TOO_LARGE = {"--cpu --memory-gib 32": ("1b", "1.4b", "2.8b"), "--gpus 1 --memory-gib 24": ("1b", "1.4b", "2.8b")}
MODES = ("vanilla", "fixed", "adaptive", "pause", "sps", "loop", "ponderlm")


def check_file(file: Path, hardware: Hardware) -> Config:
    """Read what was written, which must fit the machine and explain every key."""
    config = read_config(["--config", str(file)])
    data = check_ranks(config, hardware)
    assert fullest_memory(config, data, hardware).total <= hardware.usable_memory
    text = file.read_text(encoding="utf-8")
    section, comment = "", ""
    for line in text.splitlines():
        if line.startswith("  # "):
            comment = f"{comment} {line.strip(' #')}".strip()
        elif line.startswith("  "):
            key = line.strip().partition(":")[0]
            declared = {
                entry.key: entry.meaning for entry in entries(Config.__dataclass_fields__[section].default_factory)
            }
            assert comment == f"{' '.join(plain(declared[key]).split())}."
            comment = ""
        elif line.endswith(":") and not line.startswith("#"):
            section = line[:-1]
            assert section in SECTIONS
    return config


@pytest.mark.parametrize(
    ("size", "mode", "machine"),
    [
        ("tiny", "adaptive", "--cpu --memory-gib 32"),
        ("pythia-70m", "vanilla", "--gpus 1 --memory-gib 24"),
        ("llama-125m", "fixed", "--gpus 1 --memory-gib 24"),
    ],
)
def test_what_is_written_trains_on_its_machine(ponder, tmp_path, size, mode, machine):
    file = tmp_path / "run.yaml"
    words = ["new", "--size", size, "--mode", mode, *machine.split(), "--output", file]
    done = ponder(*words, "--data.split", "[90,10,0]")
    assert done.code == 0, done.err
    config = check_file(file, MACHINES[machine])
    assert config.ponder.mode == mode
    assert config.data.split == [90, 10, 0]
    assert config.training.run_dir == f"runs/{size}-{mode}"
    tokens = config.training.steps * config.training.global_batch_size * config.data.sequence_length
    assert tokens == pytest.approx(20 * parameters(config), rel=1e-2)
    text = file.read_text(encoding="utf-8")
    commands = [shlex.split(line) for line in re.findall(r"(?m)^#   ponder (.*)$", text)]
    assert {words[0] for words in commands} <= set(COMMANDS)
    assert ["train", "--config", str(file)] in commands
    assert f"{parameters(config) / 1e6:,.1f}M parameters" in done.out
    again = ponder(*words)
    assert (again.code, file.read_text(encoding="utf-8")) == (2, text)
    assert f"error: {file} exists already" in again.err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--size huge --cpu", "no size is known as huge"),
        ("--size tiny", "say which machine"),
        ("--size tiny --cpu --gpus 2", "--cpu and --gpus are two machines"),
        ("--size tiny --gpus 1", "--memory-gib is not known"),
        ("--size tiny --cpu --tokens 0", "tokens is 0; its range is 1 to 1e18"),
        ("--size tiny --gpu B300 --gpus 1", "no GPU is known as B300"),
        ("--size pythia-2.8b --gpus 1 --memory-gib 16", "no layout of this model fits into 14.4 GiB"),
        ("--size tiny --cpu --model.num_heads 5", "model.hidden_size 64 is not divisible"),
    ],
)
def test_what_cannot_be_is_refused_in_a_line(ponder, tmp_path, words, said):
    done = ponder("new", *words.split(), "--output", tmp_path / "run.yaml")
    assert (done.code, done.err.count("\n")) == (2, 1)
    assert said in done.err
    assert not (tmp_path / "run.yaml").exists()


def test_what_is_fixed_by_hand_stays(ponder, tmp_path):
    words = (
        "--size pythia-70m --gpu H100-SXM --gpus 2 --parallel.tensor 2 --training.steps 77 --training.recompute block"
    )
    assert ponder("new", *words.split(), "--output", tmp_path / "run.yaml").code == 0
    config = read_config(["--config", str(tmp_path / "run.yaml")])
    assert (config.parallel.tensor, config.training.steps, config.training.recompute) == (2, 77, "block")
    assert "parallel.tensor" in KEYS


@pytest.mark.slow
@pytest.mark.parametrize("machine", MACHINES)
def test_every_size_and_mode_trains_where_it_fits(ponder, tmp_path, machine):
    pairs = [*zip(itertools.cycle(MODES), SIZES, strict=False)]
    for mode, size in pairs if MACHINES[machine].ranks == 1 else pairs[1::3]:  # with many ranks there are many layouts
        file = tmp_path / f"{size}-{mode}.yaml"
        done = ponder("new", "--size", size, "--mode", mode, *machine.split(), "--output", file)
        if done.code and mode == "sps" and SIZES[size].model["hidden_size"] // SIZES[size].model["num_heads"] > 128:
            assert "triton needs heads of at most 128 channels, model.head_size; change one of these" in done.err
        elif done.code and size.endswith(TOO_LARGE.get(machine, ())):
            assert "no layout of this model fits" in done.err
        else:
            assert done.code == 0, done.err
            check_file(file, MACHINES[machine])


@pytest.mark.slow
def test_ranks_of_what_is_written_start(ponder, tmp_path):
    file = tmp_path / "run.yaml"
    assert ponder("new", "--size", "pythia-70m", "--gpu", "H100-SXM", "--gpus", 2, "--output", file).code == 0
    done = ponder("estimate", "--config", file, "--dry-run", 2)
    assert done.code == 0, done.err
