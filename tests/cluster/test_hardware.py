"""Descriptions of clusters, and what is said of those that cannot be."""

import re
from dataclasses import fields
from pathlib import Path

import pytest

from megatron_ponder.base.errors import UserError
from megatron_ponder.cluster.gpus import GPUS
from megatron_ponder.cluster.hardware import GIB, ClusterDescription, read_description

EXAMPLES = Path(__file__).parents[2] / "examples" / "clusters"
NUMBERS = {"memory_gib": 10.0, "tflops": 5.0, "memory_bandwidth": 100.0, "intra_bandwidth": 7.0}


@pytest.mark.parametrize("name", list(GPUS))
def test_every_known_gpu(name):
    precision = "bf16" if GPUS[name].bf16 else "fp32"
    cluster = ClusterDescription(gpu=name, nodes=3, gpus_per_node=4).cluster(precision)
    assert cluster.ranks == 12
    assert cluster.peak == pytest.approx(GPUS[name].peak(precision))
    assert cluster.memory == pytest.approx(GPUS[name].memory * 1e9)
    assert cluster.intra_bandwidth == pytest.approx(GPUS[name].link)


def test_numbers_in_place_of_a_name_and_over_it():
    cluster = ClusterDescription(**NUMBERS, inter_latency_us=3.0).cluster("bf16")
    assert (cluster.memory, cluster.peak, cluster.memory_bandwidth) == (10 * GIB, 5e12, 100e9)
    assert (cluster.intra_bandwidth, cluster.inter_bandwidth, cluster.inter_latency) == (7e9, 50e9, pytest.approx(3e-6))
    assert ClusterDescription(gpu="V100", tflops=60.0).cluster("bf16").peak == 60e12


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_examples(path):
    cluster = read_description(path, {}).cluster("bf16")
    assert cluster.ranks >= 32
    assert read_description(path, {"nodes": 7, "gpu": None}).cluster("bf16").nodes == 7


def test_every_key_is_documented_with_its_default():
    text = (EXAMPLES.parents[1] / "docs" / "planning.md").read_text(encoding="utf-8")
    table = text.split("### The cluster")[1].split("###")[0]
    documented = dict(re.findall(r"^\| `(\w+)` \| (.+?) \| \S.* \|$", table, re.MULTILINE))
    assert list(documented) == [field.name for field in fields(ClusterDescription)]
    for field in fields(ClusterDescription):
        shown = {None: "the GPU's"}.get(field.default, f"`{field.default}`")
        assert documented[field.name] == ("none" if field.name == "gpu" else shown)
    assert all(f"`{name}`" in table for name in GPUS)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"gpu": "H100"}, "no GPU is known as H100; choose one of V100"),
        ({"gpu": "V100"}, "V100 has no units for bf16"),
        ({}, "--memory-gib is not known"),
        (NUMBERS | {"nodes": 0}, "nodes is 0; it must be positive"),
        (NUMBERS | {"tflops": -1.0}, "tflops is -1.0; it must be positive"),
        (NUMBERS | {"matrix_share": 1.5}, "matrix_share is 1.5; it must be a share between 0 and 1"),
    ],
)
def test_what_cannot_be(values, message):
    with pytest.raises(UserError) as caught:
        ClusterDescription(**values).cluster("bf16")
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1, 2", "is not valid YAML: line 1: "),
        ("[1, 2]", "must hold keys such as `gpu: H100-SXM`"),
        ("", "must hold keys such as"),
        ("nodes: 1\nnodes: 2", "line 2: `nodes` is there already, in line 1; keep one of them"),
        ("nods: 3", "unknown key nods; did you mean nodes?"),
        ("nodes: many", "nodes is 'many'; give a number"),
        ("gpu: 3", "gpu is 3; give a name"),
        ("tflops: true", "tflops is True; give a number"),
    ],
)
def test_files_that_are_no_description(tmp_path, text, message):
    path = tmp_path / "cluster.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        read_description(path, {})
    assert message in str(caught.value)
