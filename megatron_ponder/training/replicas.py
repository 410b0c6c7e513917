"""Comparison of the parameters that several ranks hold, which have to stay the same.

Bit for bit on CPUs, and on GPUs where `training.deterministic` asks for it. Elsewhere NCCL may add up the gradients of
one data group in another order than those of its neighbour, so that what tensor ranks hold alike drifts apart by
rounding: while that is small, all take what the first has, and the run goes on.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_ponder.base.errors import UserError
from megatron_ponder.config import Config
from megatron_ponder.parallel.mesh import Axis
from megatron_ponder.parallel.sharding import declarations
from megatron_ponder.training.deepspeed_engine import Engine

Named = tuple[str, nn.Parameter]
# Along which ranks parameters are compared, and what those are called.
COMPARED = {"copies": "copies of the model", "tensor": "tensor ranks", "tied": "the ends of the pipeline"}


class Drift(NamedTuple):
    """How far replicas were apart, before all took what the first rank has.

    Attributes:
        parameters: how many differed, on the pipeline rank where most did.
        size: largest norm of a difference over that of its parameter.
    """

    parameters: int
    size: float


def allowed_drift(config: Config, device: torch.device) -> float:
    """The largest `Drift.size` that is mended; 0 where every bit has to be the same."""
    exact = device.type == "cpu" or config.training.deterministic
    return 0.0 if exact else config.parallel.replica_tolerance


def mend_replicas(engine: Engine, step: int, allowed: float, saved: str) -> Drift | None:
    """Compare what ranks hold alike, and mend what little it differs by; a collective of all ranks.

    Args:
        engine: whose parameters to compare.
        step: optimiser steps done.
        allowed: as `allowed_drift` says.
        saved: where the state is from before it can have differed, or that it is nowhere.

    Returns:
        What has been mended; None if nothing differed.

    Raises:
        UserError: on ranks that see it differ by more, after which they no longer train one model.
    """
    found = Drift(0, 0.0)
    for name in COMPARED:
        axis = _axis(engine, name)
        if axis is None or axis.size == 1:
            continue
        differing = _differing(engine, name)
        sizes = [_size(engine.held(parameter), axis) for _, parameter in differing]
        drift = _largest(Drift(len(sizes), max(sizes, default=0.0)), engine)
        if drift.size > allowed or (drift.parameters and not allowed):
            if differing:
                raise UserError(_complaint(differing, step, name, drift, saved))
            return None  # others raise
        _take_first(engine, name, differing)
        found = Drift(max(found.parameters, drift.parameters), max(found.size, drift.size))
    return found if found.parameters else None


def differing_replicas(engine: Engine, name: str = "tensor") -> list[str]:
    """Names of parameters that ranks along an axis should hold bit for bit alike, and do not; a collective of them."""
    return [parameter for parameter, _ in _differing(engine, name)]


def _differing(engine: Engine, name: str) -> list[Named]:
    """What differs along one axis, for any rank along the other, so that both may do something about it together."""
    replicas = _replicas(engine, name)
    if not replicas:
        return []
    axis, other = _axis(engine, name), engine.mesh.copies if name == "tensor" else engine.mesh.tensor
    checksums = torch.stack([_checksum(engine.held(parameter)) for _, parameter in replicas])
    everyones = [torch.empty_like(checksums) for _ in range(axis.size)]
    dist.all_gather(everyones, checksums, group=axis.group)
    differs = (torch.stack(everyones) != checksums).any(0).int()
    if other.size > 1:
        dist.all_reduce(differs, dist.ReduceOp.MAX, group=other.group)
    return [replica for replica, different in zip(replicas, differs.tolist(), strict=True) if different]


def _axis(engine: Engine, name: str) -> Axis | None:
    """The ranks of one kind that this rank is one of, or that there are elsewhere; None where there are none."""
    return engine.tied if name == "tied" else getattr(engine.mesh, name)


def _replicas(engine: Engine, name: str) -> list[Named]:
    """What every rank along an axis holds: of tensor ranks what is not sharded, of copies all, if it is whole."""
    declared = declarations(engine.model)
    if name == "tied":
        return [(own, parameter) for own, parameter, *_ in declared if parameter is engine.model.tied]
    if name == "tensor":
        return [(own, parameter) for own, parameter, spec, _ in declared if spec.shard_dim is None]
    return [] if engine.shares_weights else [(own, parameter) for own, parameter, *_ in declared]


def _size(held: Tensor, axis: Axis) -> float:
    """Norm of the difference to the first rank's, over the norm of that; a collective of the axis."""
    first = held.clone()
    dist.broadcast(first, group=axis.group, group_src=0)
    difference, norm = (float(x.double().norm()) for x in (held.double() - first.double(), first))
    if difference == 0:
        return 0.0
    size = difference / norm if norm else math.inf
    return size if math.isfinite(size) else math.inf


def _largest(drift: Drift, engine: Engine) -> Drift:
    """The largest of all ranks."""
    both = torch.tensor(drift, dtype=torch.float64, device=engine.mesh.device)
    dist.all_reduce(both, dist.ReduceOp.MAX)
    parameters, size = both.tolist()
    return Drift(round(parameters), size)


def _take_first(engine: Engine, name: str, differing: Sequence[Named]) -> None:
    """Give all ranks along an axis what its first one has of these parameters, and of what the optimiser keeps."""
    axis = _axis(engine, name)
    for _, parameter in differing:
        dist.broadcast(engine.held(parameter), group=axis.group, group_src=0)
        # Copies hold the optimiser's state in shares unless each has all of it.
        for kind in engine.kinds(parameter) if name != "copies" or engine.keeps_state_whole else ():
            whole = engine.master(parameter, kind).clone()
            dist.broadcast(whole, group=axis.group, group_src=0)
            engine.set_master(parameter, kind, whole)


def _complaint(differing: Sequence[Named], step: int, name: str, drift: Drift, saved: str) -> str:
    more = f" and {len(differing) - 1} more replicated parameters differ" if len(differing) > 1 else " differs"
    return (
        f"after step {step}, {differing[0][0]}{more} between {COMPARED[name]} by {drift.size:.1e} of their norm, as "
        f"faulty memory or a faulty link makes them; {saved}, on other nodes"
    )


def _checksum(tensor: Tensor) -> Tensor:
    """Sum of the bit patterns, int64, in which a single flipped bit shows."""
    bits = tensor.contiguous().view(torch.int16 if tensor.dtype == torch.bfloat16 else torch.int32)
    return bits.sum(dtype=torch.int64)
