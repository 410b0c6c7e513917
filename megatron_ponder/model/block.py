"""Pre-norm decoder blocks."""

from collections.abc import Callable, Sequence

from torch import Tensor
from torch.utils.checkpoint import checkpoint

from megatron_ponder.config import ModelConfig
from megatron_ponder.kernels.gated import ACTIVATIONS, gated
from megatron_ponder.model.attention import Attention, KeysAndValues, LayerCache, Slots
from megatron_ponder.model.norms import make_norm
from megatron_ponder.model.recipes import keep_recipe
from megatron_ponder.parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron_ponder.parallel.mesh import Axis
from megatron_ponder.parallel.regions import enter
from megatron_ponder.parallel.sharding import ShardedModule, normal


def make_feed_forward(config: ModelConfig, axis: Axis) -> "FeedForward":
    """The feed-forward layer, gated or not."""
    return (GatedFeedForward if config.gated_ffn else FeedForward)(config, axis)


class FeedForward(ShardedModule):
    """W_down act(W_up x)."""

    INPUTS = ("up_proj",)

    def __init__(self, config: ModelConfig, axis: Axis) -> None:
        super().__init__(axis)
        hidden, ffn, bias = config.hidden_size, config.ffn_hidden_size, config.other_biases
        self.activation = config.activation
        for name in self.INPUTS:
            self.add_module(name, ColumnParallelLinear(hidden, ffn, axis, normal(config.init_std), bias))
        self.down_proj = RowParallelLinear(ffn, hidden, axis, normal(config.residual_std), bias)

    def forward(self, x: Tensor, tokens: int, recipes: bool = False) -> Tensor:
        """(B, slots of `tokens` tokens, H) to the same; `recipes` keeps recipes of what down_proj reads."""
        activated, recipe = self.activate(enter(x, self.axis, tokens))
        with keep_recipe(recipes, activated, recipe):
            return self.down_proj(activated, tokens)

    def activate(self, x: Tensor) -> tuple[Tensor, Callable[[], Tensor]]:
        """What down_proj reads, (B, T, this rank's share of its width), and how to compute it again."""
        act, up = ACTIVATIONS[self.activation].function, self.up_proj(x)
        return act(up), lambda: act(up)


class GatedFeedForward(FeedForward):
    """W_down (act(W_gate x) · W_up x)."""

    INPUTS = ("gate_proj", "up_proj")

    def expand(self, x: Tensor) -> Sequence[Tensor]:
        """W_gate x and W_up x, this rank's features of them."""
        return self.gate_proj(x), self.up_proj(x)

    def activate(self, x: Tensor) -> tuple[Tensor, Callable[[], Tensor]]:
        gate, up = self.expand(x)
        again = lambda: gated(self.activation, gate, up)
        return again(), again


class Block(ShardedModule):
    """One decoder block: attention and feed-forward on the residual stream, each after a norm."""

    def __init__(self, config: ModelConfig, axis: Axis) -> None:
        super().__init__(axis)
        self.parallel_residual = config.residual == "parallel"
        self.attention_norm = make_norm(config, axis)
        self.attention = Attention(config, axis)
        self.mlp_norm = make_norm(config, axis)
        self.mlp = make_feed_forward(config, axis)

    def forward(
        self,
        x_BTH: Tensor,
        slots: Slots,
        cache: LayerCache | None = None,
        recipes: bool = False,
        recompute_attention: bool = False,
    ) -> Tensor | tuple[Tensor, KeysAndValues]:
        """The residual stream after this block.

        Args:
            x_BTH: the residual stream before it.
            slots: what its positions are.
            cache: as in `Attention.forward`.
            recipes: keep recipes of norms and activations for the backward pass.
            recompute_attention: keep attention's input alone and compute it again in the backward pass.

        Returns:
            (B, kept slots, H): slots that are not kept get no further than being keys and values. Of the slots of a
            `step` also its keys and values, as of `Attention.forward`.
        """
        if recompute_attention:
            attended = checkpoint(self._attend, x_BTH, slots, use_reentrant=False, preserve_rng_state=False)
        else:
            attended = self._attend(x_BTH, slots, cache, recipes)
        attended, made = (attended, None) if slots.step is None else attended
        x_BTH = slots.keep(x_BTH, self.axis.share(slots.tokens))
        mlp_input = x_BTH if self.parallel_residual else x_BTH + attended
        normed = self.mlp_norm(mlp_input)
        with keep_recipe(recipes, normed, self.mlp_norm.recipe(mlp_input)):
            changed = self.mlp(normed, slots.tokens, recipes)
        y_BTH = mlp_input + attended + changed if self.parallel_residual else mlp_input + changed
        return y_BTH if made is None else (y_BTH, made)

    def _attend(
        self, x_BTH: Tensor, slots: Slots, cache: LayerCache | None = None, recipes: bool = False
    ) -> Tensor | tuple[Tensor, KeysAndValues]:
        normed = self.attention_norm(x_BTH)
        with keep_recipe(recipes, normed, self.attention_norm.recipe(x_BTH)):
            return self.attention(normed, slots, cache)
