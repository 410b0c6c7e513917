"""The configurations in examples/configs and examples/long_context train as they are on the GPUs that they are for."""

from pathlib import Path

import pytest

from megatron_ponder.cluster.description import Cluster
from megatron_ponder.cluster.gpus import GPUS
from megatron_ponder.cluster.hardware import hardware_of
from megatron_ponder.config import read_config
from megatron_ponder.estimates.search import check_ranks, fullest_memory
from tests import REPOSITORY

FILES = sorted(file for of in ("configs", "long_context") for file in (REPOSITORY / "examples" / of).glob("*.yaml"))
GPUS_OF_80_GB = [name for name, gpu in GPUS.items() if gpu.memory == 80]
# Of the Pythia suite (Biderman et al., 2023, table 1), and for LLaMA's sizes those of PonderLM's authors (410M and
# 1.4B) or of the nearest GPT-3 (Brown et al., 2020, table 2.1).
PUBLISHED_RATES = {
    "pythia_70m": 1e-3,
    "pythia_160m": 6e-4,
    "pythia_410m": 3e-4,
    "pythia_1b": 3e-4,
    "pythia_1.4b": 2e-4,
    "pythia_2.8b": 1.6e-4,
    "llama_125m": 6e-4,
    "llama_410m": 3e-4,
    "llama_834m": 2.5e-4,
    "llama_1.4b": 2e-4,
    "llama_2.8b": 1.6e-4,
    "llama_410m_8xh100": 3e-4,
    "llama_1.4b_32xh100": 2e-4,
    "llama_410m_32k": 3e-5,  # a tenth of it, in a continuation
}


@pytest.mark.parametrize("mode", ["adaptive", "fixed", "vanilla"])
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_each_fits_nodes_of_eight_gpus_with_80_gb(file: Path, mode):
    config = read_config(["--config", str(file), "--ponder.mode", mode])
    clusters = [
        hardware_of(Cluster(gpu=name, nodes=nodes), config.training.precision)
        for name in GPUS_OF_80_GB
        for nodes in (1, 2, 4, 8)
    ]
    ranks = {check_ranks(config, cluster): cluster for cluster in clusters}
    memory = fullest_memory(config, min(ranks), ranks[min(ranks)])  # more ranks share more of the optimiser
    assert memory.total <= min(cluster.usable_memory for cluster in clusters), f"{memory.total / 2**30:.1f} GiB"


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_each_learns_at_the_published_rate(file: Path):
    assert read_config(["--config", str(file)]).optimizer.learning_rate == PUBLISHED_RATES[file.stem]
