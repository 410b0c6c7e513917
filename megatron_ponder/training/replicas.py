"""Comparison of the parameters that several ranks hold, which have to stay the same bit for bit."""

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_ponder.base.errors import UserError
from megatron_ponder.parallel.sharding import declarations
from megatron_ponder.training.deepspeed_engine import Engine


def check_replicas(engine: Engine, step: int) -> None:
    """Compare what tensor ranks hold replicated; a collective of them.

    Args:
        engine: whose parameters to compare.
        step: optimiser steps done.

    Raises:
        UserError: if it has come to differ, after which they no longer train one model.
    """
    differing = differing_replicas(engine)
    if differing:
        raise UserError(
            f"after step {step}, {differing[0]} and {len(differing) - 1} more replicated parameters differ between "
            "tensor ranks, as faulty memory or a faulty link makes them; resume from the last checkpoint on other nodes"
        )


def differing_replicas(engine: Engine) -> list[str]:
    """Names of parameters that tensor ranks should hold bit for bit alike, and do not; a collective of them."""
    axis = engine.mesh.tensor
    replicated = [
        (name, parameter) for name, parameter, spec, _ in declarations(engine.model) if spec.shard_dim is None
    ]
    checksums = torch.stack([_checksum(engine.held(parameter)) for _, parameter in replicated])
    everyones = [torch.empty_like(checksums) for _ in range(axis.size)]
    dist.all_gather(everyones, checksums, group=axis.group)
    differs = (torch.stack(everyones) != checksums).any(0).tolist()
    return [name for (name, _), different in zip(replicated, differs, strict=True) if different]


def _checksum(tensor: Tensor) -> Tensor:
    """Sum of the bit patterns, int64, in which a single flipped bit shows."""
    bits = tensor.contiguous().view(torch.int16 if tensor.dtype == torch.bfloat16 else torch.int32)
    return bits.sum(dtype=torch.int64)
