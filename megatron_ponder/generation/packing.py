"""Weights as the matrix library of CPUs wants them.

oneDNN multiplies few rows, which is what generation has, by a matrix in an order of its own, in about half the time
that a plain one takes. Rearranging costs as much as a few forwards, so that it is done once, for a copy of the model.
"""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from megatron_ponder.model.attention import Attention
from megatron_ponder.model.block import GatedFeedForward
from megatron_ponder.parallel.layers import ParallelLinear

# Linear layers that read the same input become one product: which, and the method that returns their outputs.
TOGETHER = {
    Attention: (("q_proj", "k_proj", "v_proj"), "project"),
    GatedFeedForward: (GatedFeedForward.INPUTS, "expand"),
}


def packed(module: nn.Module) -> nn.Module:
    """The module itself, or, in fp32 on a CPU that has oneDNN, a twin that computes the same faster.

    The twin's linear layers hold rearranged copies of their weights as they are now, and have no gradients; all other
    parameters are those of the module.
    """
    if isinstance(module, ParallelLinear):
        if not _suits(module.weight):
            return module
        twin = copy.copy(module)
        twin.product = _PackedProduct(module.weight)
        return twin
    names, method = TOGETHER.get(type(module), ((), ""))
    linears = [module._modules[name] for name in names]
    children = {
        name: packed(child) for name, child in module._modules.items() if child is not None and name not in names
    }
    if all(child is module._modules[name] for name, child in children.items()):
        return module
    twin = copy.copy(module)
    twin._modules = module._modules | children
    if linears:
        setattr(twin, method, _PackedProducts(linears))
    return twin


def _suits(weight: Tensor) -> bool:
    return torch.backends.mkldnn.is_available() and weight.device.type == "cpu" and weight.dtype == torch.float32


class _PackedProduct:
    """x Wᵀ + b with a rearranged W."""

    def __init__(self, weight: Tensor) -> None:
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach())

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self._weight, bias, "none", [], "")


class _PackedProducts:
    """x Wᵀ + b of several linear layers as one product, returned apart."""

    def __init__(self, linears: Sequence[ParallelLinear]) -> None:
        self._product = _PackedProduct(torch.cat([linear.weight.detach() for linear in linears]))
        self._bias = None if linears[0].bias is None else torch.cat([linear.bias.detach() for linear in linears])
        self._sizes = [len(linear.weight) for linear in linears]

    def __call__(self, x: Tensor) -> Sequence[Tensor]:
        return self._product(x, self._bias).split(self._sizes, -1)
