"""What a layer declares about its parameters: how they begin and how they are split over the tensor ranks.

Initialisation, the gradient norm, checkpoints and conversion all read this one declaration.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_ponder.parallel.mesh import Axis

Initializer = Callable[[Tensor, torch.Generator], None]


@dataclass(frozen=True)
class ParameterSpec:
    """What a layer declares about one parameter.

    Attributes:
        shape: of the whole parameter, as one process would hold it and every checkpoint does.
        initialize: fills a tensor of that shape in place, given a generator.
        shard_dim: dimension that is split evenly over the tensor ranks; None if each rank holds a copy.
        multiple: each rank's part of that dimension is padded with zeros to a multiple of this; 0 if it must not be
            padded, because it divides evenly.
        of_heads: each rank applies its copy to its own heads, so that its gradient is one summand.
        matrix: it maps what one layer of a block hands to the next, so that an optimiser may take it as one matrix.
    """

    shape: tuple[int, ...]
    initialize: Initializer
    shard_dim: int | None = None
    multiple: int = 0
    of_heads: bool = False
    matrix: bool = False

    def part_shape(self, axis: Axis) -> tuple[int, ...]:
        """Shape of what each tensor rank holds."""
        shape = list(self.shape)
        if self.shard_dim is not None:
            size, unit = shape[self.shard_dim], self.multiple or 1
            assert self.multiple or size % axis.size == 0, f"{shape} over {axis.size} ranks"
            shape[self.shard_dim] = -(-size // (axis.size * unit)) * unit
        return tuple(shape)

    def shard(self, whole: Tensor, axis: Axis) -> Tensor:
        """The part of the whole parameter that this tensor rank holds."""
        if self.shard_dim is None:
            return whole
        part = self.part_shape(axis)[self.shard_dim]
        start = min(part * axis.rank, self.shape[self.shard_dim])
        own = whole.narrow(self.shard_dim, start, min(part, self.shape[self.shard_dim] - start))
        missing = part - own.shape[self.shard_dim]
        return F.pad(own, (0, 0) * (whole.dim() - 1 - self.shard_dim) + (0, missing)) if missing else own

    def unshard(self, parts: Sequence[Tensor]) -> Tensor:
        """The whole parameter from the parts of all tensor ranks, in order."""
        if self.shard_dim is None:
            return parts[0]
        return torch.cat(list(parts), self.shard_dim).narrow(self.shard_dim, 0, self.shape[self.shard_dim])


def gathered(part: Tensor, spec: ParameterSpec, axis: Axis) -> Tensor:
    """The whole of what each tensor rank has a part of, such as a parameter or its gradient; a collective of them."""
    if spec.shard_dim is None or axis.size == 1:
        return spec.unshard([part])
    parts = [torch.empty_like(part, memory_format=torch.contiguous_format) for _ in range(axis.size)]
    dist.all_gather(parts, part.contiguous(), group=axis.group)
    return spec.unshard(parts)


def normal(std: float) -> Initializer:
    """Independent normal numbers of mean 0."""
    return lambda tensor, generator: tensor.normal_(0.0, std, generator=generator)


def constant(value: float) -> Initializer:
    """The same number everywhere."""
    return lambda tensor, _: tensor.fill_(value)


class ShardedModule(nn.Module):
    """A module that declares its own parameters; its children declare theirs.

    Attributes:
        specs: the declaration of each parameter, by its name within this module.
        axis: the tensor ranks.
    """

    def __init__(self, axis: Axis) -> None:
        super().__init__()
        self.axis = axis
        self.specs: dict[str, ParameterSpec] = {}

    def declare(self, name: str, spec: ParameterSpec) -> None:
        """Allocate this rank's part of a parameter; `initialize` fills it.

        Raises:
            AssertionError: if the dimension cannot be split evenly, which the configuration should have refused.
        """
        self.specs[name] = spec
        self.register_parameter(name, nn.Parameter(torch.empty(spec.part_shape(self.axis))))


def declarations(model: nn.Module) -> Iterator[tuple[str, nn.Parameter, ParameterSpec, Axis]]:
    """Every parameter of a model once: full name, this rank's part, its declaration, the tensor ranks."""
    seen: set[int] = set()
    for prefix, module in model.named_modules():
        if not isinstance(module, ShardedModule):
            assert not list(module.parameters(recurse=False)), f"{prefix} holds parameters that it does not declare"
            continue
        for name, spec in module.specs.items():
            parameter = getattr(module, name)
            if id(parameter) not in seen:  # tied parameters belong to the first module that declares them
                seen.add(id(parameter))
                yield (f"{prefix}.{name}" if prefix else name), parameter, spec, module.axis


@torch.no_grad()
def initialize(model: nn.Module, seed: int) -> None:
    """Fill every parameter from (seed, its name) alone, so that the layout changes nothing."""
    for name, parameter, spec, axis in declarations(model):
        parameter.copy_(spec.shard(initial(name, spec, seed), axis))


def initial(name: str, spec: ParameterSpec, seed: int) -> Tensor:
    """The whole parameter as `initialize` fills it.

    Args:
        name: in full.
        spec: its declaration.
        seed: of the run.
    """
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    whole = torch.empty(spec.shape)
    spec.initialize(whole, generator)
    return whole
