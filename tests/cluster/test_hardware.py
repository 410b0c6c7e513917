"""What clusters can do, and what is said of descriptions that cannot be."""

import re
from dataclasses import fields

import pytest

from megatron_ponder.base.errors import UserError
from megatron_ponder.cluster.description import Cluster, Machines, read_cluster
from megatron_ponder.cluster.gpus import GPUS
from megatron_ponder.cluster.hardware import GIB, hardware_of
from tests import REPOSITORY

EXAMPLES = REPOSITORY / "examples"
FILES = [*sorted((EXAMPLES / "clusters").glob("*.yaml")), EXAMPLES / "slurm" / "cluster.yaml"]
NUMBERS = {"memory_gib": 10.0, "tflops": 5.0, "memory_bandwidth": 100.0, "intra_bandwidth": 7.0}


@pytest.mark.parametrize("name", list(GPUS))
def test_every_known_gpu(name):
    precision = "bf16" if GPUS[name].bf16 else "fp32"
    hardware = hardware_of(Cluster(gpu=name, nodes=3, gpus_per_node=4), precision)
    assert hardware.ranks == 12
    assert hardware.peak == pytest.approx(GPUS[name].peak(precision))
    assert hardware.memory == pytest.approx(GPUS[name].memory * 1e9)
    assert hardware.intra_bandwidth == pytest.approx(GPUS[name].link)


def test_numbers_in_place_of_a_name_and_over_it():
    hardware = hardware_of(Cluster(**NUMBERS, inter_latency_us=3.0), "bf16")
    assert (hardware.memory, hardware.peak, hardware.memory_bandwidth) == (10 * GIB, 5e12, 100e9)
    assert (hardware.intra_bandwidth, hardware.inter_bandwidth) == (7e9, 50e9)
    assert hardware.inter_latency == pytest.approx(3e-6)
    assert hardware_of(Cluster(gpu="V100", tflops=60.0), "bf16").peak == 60e12


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_examples(path):
    """Those for estimates and the one for jobs are read alike."""
    options = [] if path.parent.name == "clusters" else ["--gpu=H100-SXM", "--nodes=4"]
    cluster = read_cluster(["--cluster", str(path), *options])
    assert hardware_of(cluster, "bf16").ranks >= (8 if path.stem.endswith("_node") else 32)
    assert hardware_of(read_cluster(["--cluster", str(path), *options, "--nodes", "7"]), "bf16").nodes == 7


def test_ranks_that_do_not_take_every_gpu_of_a_node():
    assert hardware_of(Cluster(gpu="H100-SXM", nodes=2, ranks_per_node=4), "bf16").ranks == 8


def test_every_key_is_documented_with_its_default():
    text = (EXAMPLES.parent / "docs" / "planning.md").read_text(encoding="utf-8")
    table = text.split("### The cluster")[1].split("###")[0]
    documented = dict(re.findall(r"^\| `(\w+)` \| (.+?) \| \S.* \|$", table, re.MULTILINE))
    assert list(documented) == [field.name for field in fields(Machines)]
    for field in fields(Machines):
        shown = {None: "the GPU's"}.get(field.default, f"`{field.default}`")
        assert documented[field.name] == ("none" if field.name == "gpu" else shown)
    assert all(f"`{name}`" in table for name in GPUS)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"gpu": "H100"}, "no GPU is known as H100; choose one of V100"),
        ({"gpu": "V100"}, "V100 has no units for bf16"),
        ({}, "--memory-gib is not known"),
        (NUMBERS | {"gpus_per_node": 0}, "gpus_per_node is 0, and an estimate is of GPUs"),
    ],
)
def test_what_cannot_be_estimated(values, message):
    with pytest.raises(UserError) as caught:
        hardware_of(Cluster(**values), "bf16")
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1, 2", "is not valid YAML: line 1: "),
        ("[1, 2]", "must hold keys such as `nodes: 4` and `gpu: H100-SXM`"),
        ("", "must hold keys such as"),
        ("nodes: 1\nnodes: 2", "line 2: `nodes` is there already, in line 1; keep one of them"),
        ("nods: 3", "a cluster has no nods (in "),
        ("nods: 3", "did you mean nodes?"),
        ("nodes: many", "nodes is many; write a whole number"),
        ("nodes: 0", "nodes is 0; its range is 1 to"),
        ("tflops: -1.0", "tflops is -1; its range is above 0 to"),
        ("matrix_share: 1.5", "matrix_share is 1.5; its range is above 0 to 1"),
        ("tflops: true", "tflops is true; write a number"),
    ],
)
def test_files_that_are_no_description(tmp_path, text, message):
    path = tmp_path / "cluster.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        read_cluster(["--cluster", str(path)])
    assert message in str(caught.value)
