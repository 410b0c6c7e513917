"""The product of a gated feed-forward layer, act(gate) · up."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_ponder.kernels.backward import own_backward


class Activation(NamedTuple):
    """An activation function, and what autograd makes of a gradient with the function's input."""

    function: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor, Tensor], Tensor]


ACTIVATIONS = {
    "silu": Activation(F.silu, torch.ops.aten.silu_backward),
    "gelu": Activation(F.gelu, torch.ops.aten.gelu_backward),
    "gelu_tanh": Activation(
        partial(F.gelu, approximate="tanh"), partial(torch.ops.aten.gelu_backward, approximate="tanh")
    ),
}


def gated(activation: str, gate: Tensor, up: Tensor) -> Tensor:
    """act(gate) · up, of which nothing but the two inputs is kept for the backward pass.

    Args:
        activation: a name in `ACTIVATIONS`.
        gate: any shape.
        up: the same.
    """
    compute = _Gated.apply if own_backward() else _product
    return compute(activation, gate, up)


def _product(activation: str, gate: Tensor, up: Tensor) -> Tensor:
    return ACTIVATIONS[activation].function(gate).mul_(up)


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx, activation: str, gate: Tensor, up: Tensor) -> Tensor:
        ctx.activation = ACTIVATIONS[activation]
        ctx.save_for_backward(gate, up)
        return _product(activation, gate, up)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[None, Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        grad_up = ctx.activation.function(gate).mul_(grad)
        return None, ctx.activation.backward(grad * up, gate), grad_up
