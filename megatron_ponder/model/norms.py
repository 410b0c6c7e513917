"""Norms over the residual stream and over heads, replicated on the tensor ranks."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_ponder.config import ModelConfig
from megatron_ponder.kernels.rms_norm import rms_norm
from megatron_ponder.parallel.mesh import Axis
from megatron_ponder.parallel.sharding import ParameterSpec, ShardedModule, constant


class RMSNorm(ShardedModule):
    """x / sqrt(mean(x²) + ε) · g over the last dimension, statistics in fp32 or better; replicated."""

    # fp32 numbers of a row that its backward pass needs beside the input, and fp32 tensors as large as the input that
    # it makes of a narrower one.
    STATISTICS, WORKSPACE = 1, 4

    def __init__(self, hidden_size: int, epsilon: float, axis: Axis, of_heads: bool = False) -> None:
        """Declare the weight; `of_heads` as in `ParameterSpec`."""
        super().__init__(axis)
        self.epsilon = epsilon
        self.declare("weight", ParameterSpec((hidden_size,), constant(1.0), of_heads=of_heads))

    def forward(self, x: Tensor) -> Tensor:
        """Norm of x, (..., hidden), in the same shape and type."""
        return rms_norm(x, self.weight, self.epsilon)

    def recipe(self, x: Tensor) -> Callable[[], Tensor]:
        """Computes `forward(x)` again, also when this rank no longer holds the parameters."""
        weight = _kept(self.weight)
        return lambda: rms_norm(x, weight, self.epsilon)


class LayerNorm(ShardedModule):
    """(x − mean) / sqrt(variance + ε) · g + b over the last dimension; replicated."""

    STATISTICS, WORKSPACE = 2, 0  # as of RMSNorm

    def __init__(self, hidden_size: int, epsilon: float, axis: Axis) -> None:
        super().__init__(axis)
        self.epsilon = epsilon
        self.declare("weight", ParameterSpec((hidden_size,), constant(1.0)))
        self.declare("bias", ParameterSpec((hidden_size,), constant(0.0)))

    def forward(self, x: Tensor) -> Tensor:
        """Norm of x, (..., hidden), in the same shape and type."""
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.epsilon)

    def recipe(self, x: Tensor) -> Callable[[], Tensor]:
        """Computes `forward(x)` again, also when this rank no longer holds the parameters."""
        weight, bias = _kept(self.weight), _kept(self.bias)
        return lambda: F.layer_norm(x, weight.shape, weight, bias, self.epsilon)


_NORMS = {"rms": RMSNorm, "layer": LayerNorm}


def make_norm(config: ModelConfig, axis: Axis) -> RMSNorm | LayerNorm:
    """The norm that a model has."""
    return _NORMS[config.norm](config.hidden_size, config.norm_epsilon, axis)


def _kept(parameter: Tensor) -> Tensor:
    """The value that a recipe computes with; without gradients no recipe is kept, and no copy is needed."""
    return parameter.detach().clone() if torch.is_grad_enabled() else parameter.detach()
