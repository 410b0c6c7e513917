"""Comparing what several ranks hold with what one process holds."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from megatron_ponder.parallel.replicated import replicated_parameters, sum_gradients
from megatron_ponder.parallel.sharding import declarations


class Part(NamedTuple):
    """A tensor of one rank, and the dimension along which the ranks share it; None where each holds all of it.

    What lies beyond `size` along that dimension, where it is given, is padding.
    """

    tensor: Tensor
    dim: int | None = None
    size: int | None = None


def gradients(module: nn.Module) -> dict[str, Part]:
    """Every parameter's gradient, as its declaration shards it, those of replicated parameters added up."""
    replicated = replicated_parameters(module)
    if replicated:
        sum_gradients([parameter.grad for parameter in replicated], next(declarations(module))[3])
    return {
        f"grad {name}": Part(
            parameter.grad, spec.shard_dim, None if spec.shard_dim is None else spec.shape[spec.shard_dim]
        )
        for name, parameter, spec, _ in declarations(module)
    }


def assert_equal_to_one_process(ranks: list[dict[str, Part]], alone: dict[str, Part], tolerance: float) -> None:
    """Gathered parts equal the whole; what is replicated is the same on every rank."""
    assert all(parts.keys() == alone.keys() for parts in ranks)
    for name, (expected, dim, size) in alone.items():
        parts = [parts[name].tensor for parts in ranks]
        if dim is None:
            for part in parts:
                assert torch.equal(part, parts[0]), f"{name} differs between ranks"
        got = parts[0] if dim is None else torch.cat(parts, dim)
        if size is not None:
            got, padding = got.narrow(dim, 0, size), got.narrow(dim, size, got.shape[dim] - size)
            assert not padding.any(), f"padding of {name} is not 0"
        assert got.shape == expected.shape, name
        error = (got - expected).abs().max() / expected.abs().max()
        assert error <= tolerance, f"{name} is off by {error:.1e}"
        assert expected.abs().max() > 0, f"{name} is 0 and proves nothing"
