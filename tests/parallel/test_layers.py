"""Parallel layers, loss and collectives over two ranks equal one process in outputs and all gradients."""

from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_ponder.kernels import cross_entropy as cross_entropy_kernels
from megatron_ponder.kernels.cross_entropy import chunked_cross_entropy, vocab_parallel_cross_entropy
from megatron_ponder.model.norms import LayerNorm, RMSNorm
from megatron_ponder.parallel.collectives import copy_to_ranks
from megatron_ponder.parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
)
from megatron_ponder.parallel.mesh import Axis, Mesh
from megatron_ponder.parallel.regions import enter
from megatron_ponder.parallel.sharding import ShardedModule, initialize, normal
from tests.distributed import run_distributed
from tests.parallel.gathered import Part, assert_equal_to_one_process, gradients

IN, OUT, VOCAB = 6, 8, 14


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def part(whole: Tensor, axis: Axis, dim: int | None) -> Tensor:
    """This rank's part of a tensor, as a leaf that wants a gradient."""
    local = whole if dim is None else whole.chunk(axis.size, dim)[axis.rank]
    return local.clone().requires_grad_()


def evaluate(module: ShardedModule, x: Tensor, x_dim: int | None, y_dim: int | None, axis: Axis) -> dict[str, Part]:
    """Output and gradients of a layer under a loss that weighs every output differently."""
    initialize(module.double(), seed=3)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1)  # biases begin at 0
    if x.is_floating_point():
        x = part(x, axis, x_dim)
    y = apply(module, x)
    whole_shape = [*y.shape[:-1], y.shape[-1] * (axis.size if y_dim is not None else 1)]
    (y * part(random(*whole_shape, seed=1), axis, y_dim).detach()).sum().backward()
    result = {"y": Part(y.detach(), y_dim), **gradients(module)}
    return result | {"grad x": Part(x.grad, x_dim)} if x.is_floating_point() else result


def apply(module: ShardedModule, x: Tensor) -> Tensor:
    """The layer as its callers use it."""
    if isinstance(module, ColumnParallelLinear):
        return module(enter(x, module.axis, tokens=x.shape[1]))
    return module(x, tokens=x.shape[1]) if isinstance(module, RowParallelLinear) else module(x)


def cross_entropy(axis: Axis, dtype: torch.dtype, scale: float) -> dict[str, Part]:
    logits = part(scale * random(2, 5, VOCAB, dtype=dtype), axis, -1)
    loss = vocab_parallel_cross_entropy(logits, labels(), axis)
    (loss * random(2, 5, seed=2, dtype=loss.dtype)).sum().backward()
    return {"loss": Part(loss.detach()), "grad": Part(logits.grad, -1)}


def chunked(axis: Axis) -> dict[str, Part]:
    """As a head of whose columns the last are padding has them, in chunks of three tokens."""
    hidden, weight = part(random(2, 5, IN), axis, None), part(random(VOCAB, IN, seed=3), axis, 0)
    copied, known = copy_to_ranks(hidden, axis), VOCAB - 2
    with patch.object(cross_entropy_kernels, "CHUNK_BYTES", 3 * 8 * VOCAB // axis.size):
        total, losses = chunked_cross_entropy(copied, weight, labels() % known, axis, known)
    total.backward()
    return {"losses": Part(losses), "grad hidden": Part(hidden.grad), "grad weight": Part(weight.grad, 0)}


def labels() -> Tensor:
    """Labels at both ends of both ranks' parts."""
    return torch.tensor([[0, VOCAB // 2 - 1, VOCAB // 2, VOCAB - 1, 3], [9, 9, 0, 1, 12]])


def copy(axis: Axis) -> dict[str, Part]:
    x = part(random(3, OUT), axis, None)
    y = copy_to_ranks(x, axis) * part(random(OUT, 3, seed=1).T, axis, None).detach()
    (y.chunk(axis.size, -1)[axis.rank]).sum().backward()
    return {"grad x": Part(x.grad)}


CASES = {
    "column": lambda a: evaluate(ColumnParallelLinear(IN, OUT, a, normal(1)), random(2, 3, IN), None, -1, a),
    "column, bias": lambda a: evaluate(
        ColumnParallelLinear(IN, OUT, a, normal(1), True), random(1, 3, IN), None, -1, a
    ),
    "row": lambda a: evaluate(RowParallelLinear(IN, OUT, a, normal(1)), random(2, 3, IN), -1, None, a),
    "row, bias": lambda a: evaluate(RowParallelLinear(IN, OUT, a, normal(1), True), random(1, 3, IN), -1, None, a),
    "embedding": lambda a: evaluate(VocabParallelEmbedding(VOCAB, OUT, a, normal(1)), labels(), None, None, a),
    "rms norm": lambda a: evaluate(RMSNorm(OUT, 1e-5, a), random(2, 3, OUT), None, None, a),
    "layer norm": lambda a: evaluate(LayerNorm(OUT, 1e-5, a), random(2, 3, OUT), None, None, a),
    "copy": copy,
    "chunked cross-entropy": chunked,
    "cross-entropy": lambda a: cross_entropy(a, torch.float64, 3),
    "cross-entropy, fp32": lambda a: cross_entropy(a, torch.float32, 3),
    "cross-entropy, bf16": lambda a: cross_entropy(a, torch.bfloat16, 3),
    "cross-entropy, large logits": lambda a: cross_entropy(a, torch.float64, 300),
}
TOLERANCES = {"cross-entropy, fp32": 1e-6, "cross-entropy, bf16": 2**-8}


def all_cases(mesh: Mesh) -> dict[str, dict[str, Part]]:
    """Runs on every rank."""
    return {name: case(mesh.tensor) for name, case in CASES.items()}


@pytest.fixture(scope="module")
def two_ranks() -> list[dict[str, dict[str, Part]]]:
    return run_distributed(all_cases, 2, tensor=2)


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_equal_one(two_ranks, case):
    ranks = [results[case] for results in two_ranks]
    assert_equal_to_one_process(ranks, CASES[case](Axis()), TOLERANCES.get(case, 1e-12))


# One process against PyTorch --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "scale", "tolerance"),
    [(torch.float64, 3, 1e-12), (torch.float64, 300, 1e-12), (torch.float32, 3, 1e-6), (torch.bfloat16, 3, 1e-6)],
)
def test_cross_entropy_equals_torch(dtype, scale, tolerance):
    got = cross_entropy(Axis(), dtype, scale)
    logits = (scale * random(2, 5, VOCAB, dtype=dtype)).requires_grad_()
    wide = logits.to(torch.promote_types(dtype, torch.float32))
    loss = F.cross_entropy(wide.flatten(0, 1), labels().flatten(), reduction="none").view(2, 5)
    (loss * random(2, 5, seed=2, dtype=loss.dtype)).sum().backward()
    assert got["loss"].tensor.dtype == wide.dtype
    assert got["grad"].tensor.dtype == dtype
    torch.testing.assert_close(got["loss"].tensor, loss.detach(), rtol=tolerance, atol=tolerance)
    rounding = 2**-8 if dtype == torch.bfloat16 else tolerance
    torch.testing.assert_close(got["grad"].tensor, logits.grad, rtol=rounding, atol=tolerance)
