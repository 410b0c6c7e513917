"""The equations of element-wise work, against the operations of a block, counted on tensors without data."""

from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_ponder.config import ModelConfig, PonderConfig, read_config
from megatron_ponder.estimates.element_wise import of_attention, of_feed_forward
from megatron_ponder.estimates.part import part_sizes
from megatron_ponder.kernels.rotary import Rotation
from megatron_ponder.model.attention import Slots
from megatron_ponder.model.block import Block
from megatron_ponder.parallel.mesh import Axis

SLOTS = 512
PRODUCTS = {"mm", "addmm", "bmm"}
NOTHING_MOVES = {"detach", "empty", "new_empty", "empty_like", "_unsafe_view", "new_zeros"}


def size(tensor: Tensor) -> int:
    """Bytes of the distinct numbers of a tensor: those that it repeats are read once."""
    dims = [dim for dim, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride]
    return torch.Size(dims).numel() * tensor.element_size()


class Norm(torch.autograd.Function):
    """A GPU's norm is one kernel each way, which other devices compose."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, moved: Counter) -> Tensor:
        ctx.moved = moved
        ctx.save_for_backward(x, weight)
        moved["norm"] += 2 * size(x)
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight = ctx.saved_tensors
        ctx.moved["norm"] += 3 * size(x)
        return torch.empty_like(x), torch.empty_like(weight), None


class Attention(torch.autograd.Function):
    """What the kernel moves is counted with its operations."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        ctx.save_for_backward(q, k, v)
        return torch.empty_like(q)[..., : v.shape[-1]]

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, ...]:
        return tuple(map(torch.empty_like, ctx.saved_tensors))


class Bytes(TorchDispatchMode):
    """Counts what every other operation reads and writes."""

    def __init__(self, moved: Counter) -> None:
        super().__init__()
        self.moved = moved

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        name = operation._schema.name.split("::")[1]
        if not operation.is_view and name not in PRODUCTS | NOTHING_MOVES:
            read = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
            made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
            changed = [args[0]] if name.endswith("_") and name != "copy_" else []
            new = [tensor for tensor in made if not any(tensor is other for other in read)]
            self.moved[name] += sum(map(size, [*read, *new, *changed]))
        return result


def counted(model: ModelConfig, dtype: torch.dtype, weighted: bool, monkeypatch) -> list[float]:
    """Numbers that a block moves for a slot, forward and backward."""
    moved: Counter[str] = Counter()
    monkeypatch.setattr(F, "rms_norm", lambda x, _, weight, __: Norm.apply(x, weight, moved))
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda q, k, v, **_: Attention.apply(q, k, v))
    with torch.device("meta"), Bytes(moved):
        block = Block(model, Axis(1)).to(dtype)
        x = torch.empty(1, SLOTS, model.hidden_size, dtype=dtype, requires_grad=True)
        angles = Rotation(*(torch.empty(1, SLOTS, 1, model.rotated_channels // 2) for _ in range(2)))
        log_w = torch.zeros(1, SLOTS, requires_grad=True) if weighted else None
        moved.clear()
        y = block(x, Slots(SLOTS, angles, log_w), recipes=True)
        forward = moved.copy()
        torch.autograd.grad(y, [x, *block.parameters()], torch.empty_like(y))
    return [count.total() / SLOTS / dtype.itemsize for count in (forward, moved - forward)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("overrides", [{}, {"family": "gpt_neox"}, {"num_kv_heads": 4}, {"qk_norm": True}], ids=str)
def test_what_operations_move_is_what_the_equations_say(overrides, dtype, weighted, monkeypatch):
    values = {"hidden_size": 512, "num_heads": 8, "num_layers": 1, "vocab_size": 64} | overrides
    config = read_config([f"--model.{key}={value}" for key, value in values.items()])
    block = part_sizes(config.model, PonderConfig(mode="vanilla")).block
    parts = (
        of_attention(block, config.model.head_size + 8 * weighted, weighted, dtype.itemsize, fused=False),
        of_feed_forward(block, fused=False),
    )
    expected = [sum(way) for way in zip(*parts, strict=True)]
    assert counted(config.model, dtype, weighted, monkeypatch) == pytest.approx(expected, rel=0.05)
