"""What a layer declares about its parameters: how they begin and how they are split over the tensor ranks.

Initialisation, the gradient norm, checkpoints and conversion all read this one declaration.
"""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from megatron_ponder.parallel.mesh import Axis

Initializer = Callable[[Tensor, torch.Generator], None]


@dataclass(frozen=True)
class ParameterSpec:
    """What a layer declares about one parameter.

    Attributes:
        shape: of the whole parameter, as one process would hold it.
        initialize: fills a tensor of that shape in place, given a generator.
        shard_dim: dimension that is split evenly over the tensor ranks; None if each rank holds a copy.
    """

    shape: tuple[int, ...]
    initialize: Initializer
    shard_dim: int | None = None

    def shard(self, whole: Tensor, axis: Axis) -> Tensor:
        """The part of the whole parameter that this tensor rank holds."""
        return whole if self.shard_dim is None else whole.chunk(axis.size, self.shard_dim)[axis.rank]


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
        shape = list(spec.shape)
        if spec.shard_dim is not None:
            assert shape[spec.shard_dim] % self.axis.size == 0, f"{name} {shape} over {self.axis.size} ranks"
            shape[spec.shard_dim] //= self.axis.size
        self.specs[name] = spec
        self.register_parameter(name, nn.Parameter(torch.empty(shape)))


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
        digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        whole = torch.empty(spec.shape)
        spec.initialize(whole, generator)
        parameter.copy_(spec.shard(whole, axis))
