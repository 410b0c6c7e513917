"""What the benchmark counts on real ranks is what was sent, and tensor parallelism sends what the formula says."""

import pytest
import torch
import torch.distributed as dist

from benchmarks.communication import (
    LAYOUTS,
    MICRO_BATCHES,
    Count,
    Layout,
    Traffic,
    Volume,
    configuration,
    count_step,
)
from megatron_ponder.base.launch import Launch
from megatron_ponder.parallel.collectives import copy_to_ranks
from megatron_ponder.parallel.mesh import Mesh, build_mesh
from megatron_ponder.parallel.pretence import pretended_group
from tests.distributed import run_distributed

LENGTH = 7  # odd, so that sequence parallelism pads
CASES = [(layout, mode, {}) for layout in ("tp2", "tp2+sp") for mode in ("vanilla", "adaptive")]
CASES += [("tp2", "ponderlm", {}), ("tp2+sp", "ponderlm", {}), ("tp2+sp", "pause", {}), ("tp2", "loop", {})]
CASES += [(layout, "adaptive", {}) for layout in ("tp2 block", "tp2+sp block", "tp2+sp attention")]
CASES += [("tp2+sp zero1", "adaptive", {})]
CASES += [(layout, "adaptive", {"optimizer__name": "muon"}) for layout in ("tp2", "tp2+sp zero1")]
CASES += [("cp2", "adaptive", {}), ("cp2", "vanilla", {"model__num_kv_heads": 1, "data__reset_at_eod": "true"})]
CASES += [(layout, "adaptive", {}) for layout in ("cp2 block", "cp2 attention")]
CASES += [("tp2+sp", "adaptive", {"model__family": "gpt_neox", "ponder__router_hidden_size": 8})]
CASES += [
    (layout, "adaptive", {"ponder__latent_visibility": "own"})
    for layout in ("tp2", "tp2+sp", "tp2 block", "cp2", "cp2 block", "cp2 attention")
]


def count_by_hand(mesh: Mesh) -> dict[tuple[str, str], Volume]:
    x = torch.ones(3, 5, requires_grad=True)
    with Traffic(mesh) as traffic:
        copy_to_ranks(x, mesh.tensor).sum().backward()  # an all-reduce of 15 numbers, in the backward pass
        dist.all_gather_into_tensor(torch.empty(8), torch.ones(4), group=mesh.tensor.group)
        dist.reduce_scatter_tensor(torch.empty(2), torch.ones(4), group=mesh.tensor.group)
        dist.all_reduce(torch.ones(1000), group=mesh.data.group)  # of one rank: moves nothing
        if mesh.tensor.rank == 0:
            dist.send(torch.ones(9, dtype=torch.float64), group=mesh.tensor.group, dst=1)
        else:
            dist.recv(torch.empty(9, dtype=torch.float64), group=mesh.tensor.group, src=0)
    return traffic.volumes()


def count_all(mesh: Mesh) -> tuple[dict[tuple[str, str], Volume], list[Count]]:
    counts = []
    for name, mode, overrides in CASES:
        length = LENGTH + (LAYOUTS[name].context > 1)
        config = configuration(LAYOUTS[name], mode, length, model__num_layers=2, **overrides)
        counts.append(count_step(build_mesh(mesh.device, config.parallel), config))
    return count_by_hand(mesh), counts


@pytest.fixture(scope="module")
def two_ranks():
    """Everything, by rank."""
    return run_distributed(count_all, 2, tensor=2, time_limit=300)


def test_counts_what_is_called(two_ranks):
    both = {
        ("tensor", "all-reduce"): Volume(1, 60),
        ("tensor", "all-gather"): Volume(1, 32),
        ("tensor", "reduce-scatter"): Volume(1, 16),
    }
    assert two_ranks[0][0] == both | {("tensor", "send"): Volume(1, 72)}
    assert two_ranks[1][0] == both


@pytest.mark.parametrize("index", range(len(CASES)), ids=["-".join(map(str, case)) for case in CASES])
def test_ranks_move_what_the_formula_says(two_ranks, index):
    for _, counts in two_ranks:
        assert counts[index].measured == counts[index].expected()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_pipeline_sums_replicated_gradients_once_a_step(precision):
    """The first of four ranks, without the others."""
    layout = Layout(tensor=2, pipeline=2, sequence_parallel=True, zero_stage=1)
    config = configuration(layout, "adaptive", LENGTH, model__num_layers=2, training__precision=precision)
    with pretended_group(Launch(world_size=4, local_size=4), 0) as device:
        count = count_step(build_mesh(device, config.parallel), config)
    (shared,) = [term for term in count.terms if term.reason == "gradients of parameters on all ranks"]
    assert (shared.calls, shared.bytes) == (1, 2 * 64 * 4)  # the norms of one block, in fp32
    assert count.measured["tensor", "all-reduce"] == count.expected()["tensor", "all-reduce"]


def test_formula_by_hand(two_ranks):
    # 2 blocks of 4 all-reduces, embedding, head: 10 of B · L · H numbers; the loss: 1 and 2 of B · L; the gradient norm
    size = MICRO_BATCHES * 2 * LENGTH * (10 * 64 + 3) * 4 + 4
    assert two_ranks[0][1][0].measured["tensor", "all-reduce"] == Volume(MICRO_BATCHES * 12 + 1, size)
