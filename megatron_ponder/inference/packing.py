"""Weights as the matrix library of CPUs wants them.

oneDNN multiplies few rows, which is what generation has, by a matrix in an order of its own, in about half the time
that a plain one takes. Rearranging costs as much as a few forwards, so that it is done once, for a copy of the model.
"""

import copy

import torch
from torch import Tensor, nn

from megatron_ponder.parallel.layers import ParallelLinear


def packed(module: nn.Module) -> nn.Module:
    """The module itself, or, in fp32 on a CPU that has oneDNN, a twin that computes the same faster.

    The twin's linear layers hold rearranged copies of their weights as they are now, and have no gradients; all other
    parameters are those of the module.
    """
    if isinstance(module, ParallelLinear):
        weight = module.weight
        if not (torch.backends.mkldnn.is_available() and weight.device.type == "cpu" and weight.dtype == torch.float32):
            return module
        twin = copy.copy(module)
        twin.product = _PackedProduct(weight)
        return twin
    children = {name: packed(child) for name, child in module._modules.items() if child is not None}
    if all(child is module._modules[name] for name, child in children.items()):
        return module
    twin = copy.copy(module)
    twin._modules = module._modules | children
    return twin


class _PackedProduct:
    """x Wᵀ + b with a rearranged W."""

    def __init__(self, weight: Tensor) -> None:
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach())

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self._weight, bias, "none", [], "")
