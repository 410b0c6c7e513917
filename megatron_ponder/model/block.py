"""Pre-norm decoder blocks of the two families."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from megatron_ponder.config import ModelConfig
from megatron_ponder.model.attention import Attention, LayerCache, Slots
from megatron_ponder.model.recipes import keep_recipe
from megatron_ponder.parallel.layers import ColumnParallelLinear, LayerNorm, RMSNorm, RowParallelLinear
from megatron_ponder.parallel.mesh import Axis
from megatron_ponder.parallel.regions import enter
from megatron_ponder.parallel.sharding import ShardedModule, normal


def make_norm(config: ModelConfig, axis: Axis) -> RMSNorm | LayerNorm:
    """The family's norm over the residual stream."""
    norm = RMSNorm if config.family == "llama" else LayerNorm
    return norm(config.hidden_size, config.norm_epsilon, axis)


class _SwiGLU(torch.autograd.Function):
    """silu(gate) · up that keeps only its two inputs."""

    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        grad_up = F.silu(gate).mul_(grad)
        grad_gate = torch.ops.aten.silu_backward(grad * up, gate)
        return grad_gate, grad_up


class SwiGLU(ShardedModule):
    """Feed-forward of the llama family: W_down (silu(W_gate x) · W_up x)."""

    def __init__(self, config: ModelConfig, axis: Axis) -> None:
        super().__init__(axis)
        hidden, ffn = config.hidden_size, config.ffn_hidden_size
        initial, last = normal(config.init_std), normal(config.init_std / math.sqrt(2 * config.num_layers))
        self.gate_proj = ColumnParallelLinear(hidden, ffn, axis, initial)
        self.up_proj = ColumnParallelLinear(hidden, ffn, axis, initial)
        self.down_proj = RowParallelLinear(ffn, hidden, axis, last)

    def expand(self, x: Tensor) -> Sequence[Tensor]:
        """W_gate x and W_up x, this rank's features of them."""
        return self.gate_proj(x), self.up_proj(x)

    def forward(self, x: Tensor, tokens: int, recipes: bool = False) -> Tensor:
        """(B, slots of `tokens` tokens, H) to the same; `recipes` keeps the product's recipe for the backward pass."""
        gate, up = self.expand(enter(x, self.axis, tokens))
        product = _SwiGLU.apply(gate, up) if not torch.is_inference_mode_enabled() else F.silu(gate).mul_(up)
        with keep_recipe(recipes, product, lambda: F.silu(gate).mul_(up)):
            return self.down_proj(product, tokens)


class GeluMLP(ShardedModule):
    """Feed-forward of the gpt_neox family: W_down gelu(W_up x), with biases."""

    def __init__(self, config: ModelConfig, axis: Axis) -> None:
        super().__init__(axis)
        hidden, ffn = config.hidden_size, config.ffn_hidden_size
        initial, last = normal(config.init_std), normal(config.init_std / math.sqrt(2 * config.num_layers))
        self.up_proj = ColumnParallelLinear(hidden, ffn, axis, initial, bias=True)
        self.down_proj = RowParallelLinear(ffn, hidden, axis, last, bias=True)

    def forward(self, x: Tensor, tokens: int, recipes: bool = False) -> Tensor:
        """(B, slots of `tokens` tokens, H) to the same; `recipes` keeps the recipe of gelu for the backward pass."""
        up = self.up_proj(enter(x, self.axis, tokens))
        activated = F.gelu(up)
        with keep_recipe(recipes, activated, lambda: F.gelu(up)):
            return self.down_proj(activated, tokens)


class Block(ShardedModule):
    """One decoder block: attention and feed-forward on the residual stream, each after a norm."""

    def __init__(self, config: ModelConfig, axis: Axis) -> None:
        super().__init__(axis)
        self.parallel_residual = config.family == "gpt_neox" and config.parallel_residual
        self.attention_norm = make_norm(config, axis)
        self.attention = Attention(config, axis)
        self.mlp_norm = make_norm(config, axis)
        self.mlp = (SwiGLU if config.family == "llama" else GeluMLP)(config, axis)

    def forward(
        self,
        x_BTH: Tensor,
        slots: Slots,
        cache: LayerCache | None = None,
        recipes: bool = False,
        recompute_attention: bool = False,
    ) -> Tensor:
        """The residual stream after this block.

        Args:
            x_BTH: the residual stream before it.
            slots: what its positions are.
            cache: as in `Attention.forward`.
            recipes: keep recipes of norms and activations for the backward pass.
            recompute_attention: keep attention's input alone and compute it again in the backward pass.

        Returns:
            (B, kept slots, H): slots that are not kept get no further than being keys and values.
        """
        if recompute_attention:
            attended = checkpoint(self._attend, x_BTH, slots, use_reentrant=False, preserve_rng_state=False)
        else:
            attended = self._attend(x_BTH, slots, cache, recipes)
        x_BTH = slots.keep(x_BTH, self.axis.share(slots.tokens))
        mlp_input = x_BTH if self.parallel_residual else x_BTH + attended
        normed = self.mlp_norm(mlp_input)
        with keep_recipe(recipes, normed, self.mlp_norm.recipe(mlp_input)):
            changed = self.mlp(normed, slots.tokens, recipes)
        return mlp_input + attended + changed if self.parallel_residual else mlp_input + changed

    def _attend(self, x_BTH: Tensor, slots: Slots, cache: LayerCache | None = None, recipes: bool = False) -> Tensor:
        normed = self.attention_norm(x_BTH)
        with keep_recipe(recipes, normed, self.attention_norm.recipe(x_BTH)):
            return self.attention(normed, slots, cache)
