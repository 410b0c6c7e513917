"""The section about the transformer."""

import math
from dataclasses import dataclass
from typing import Literal

from megatron_ponder.config.declarations import changeable, number_field
from megatron_ponder.config.families import FAMILIES, Family


@dataclass(frozen=True)
class ModelConfig:
    """The transformer. A feature that is not given is the family's."""

    family: Family = "llama"
    """Name of a set of [features](#families): `llama` or `gpt_neox`."""
    hidden_size: int = number_field(768, 1, 2**20)
    """Width H of the residual stream."""
    num_layers: int = number_field(12, 1, 10_000)
    """Number of blocks."""
    num_heads: int = number_field(12, 1, 2**16)
    """Number of query heads; must divide `hidden_size`."""
    num_kv_heads: int | None = number_field(None, 1, 2**16)
    """Number of key and value heads, a divisor of `num_heads`; `num_heads` unless given."""
    ffn_hidden_size: int | None = number_field(None, 1, 2**22)
    """Width of the feed-forward layer; unless given 8/3 H, rounded up to a multiple of 16, if it is gated, and 4 H if
    not."""
    vocab_size: int | None = number_field(None, 2, 2**24)
    """Number of tokens, at least the tokenizer's; as many as the tokenizer has unless given."""
    max_position_embeddings: int | None = changeable(number_field(None, 1, 2**24))
    """Longest sequence in tokens that the model is meant for; `data.sequence_length` unless given."""
    norm: Literal["rms", "layer"] | None = None
    """`rms` (RMSNorm) or `layer` (LayerNorm)."""
    norm_epsilon: float = number_field(1e-5, 1e-12, 0.1)
    """Added to the variance in the norms."""
    gated_ffn: bool | None = None
    """The feed-forward layer multiplies what is activated by a second projection, as SwiGLU does."""
    activation: Literal["silu", "gelu"] | None = None
    """Of the feed-forward layer: `silu`, or `gelu`, which is the exact one."""
    biases: Literal["none", "all"] | None = None
    """Linear layers that have one: `none`, or `all` but the output head."""
    rope_theta: float = number_field(10000.0, 1, 1e12)
    """Base of the rotary frequencies."""
    rotary_fraction: float | None = number_field(None, 0, 1, above=True)
    """Share of each head's channels that are rotated."""
    residual: Literal["sequential", "parallel"] | None = None
    """`sequential` (the feed-forward layer reads what attention has changed) or `parallel` (both read the same)."""
    tie_embeddings: bool = False
    """Use the input embedding as output head."""
    init_std: float = changeable(number_field(0.02, 1e-6, 10))
    """Standard deviation of the initial weights of linear layers."""

    @property
    def head_size(self) -> int:
        """Channels of one head."""
        return self.hidden_size // self.num_heads

    @property
    def rotated_channels(self) -> int:
        """Channels of a head that are rotated."""
        return int(self.head_size * self.rotary_fraction)

    @property
    def qkv_biases(self) -> bool:
        """Whether queries, keys and values have a bias."""
        return self.biases == "all"

    @property
    def other_biases(self) -> bool:
        """Whether all other linear layers of a block have one."""
        return self.biases == "all"

    @property
    def residual_std(self) -> float:
        """Standard deviation of the initial weights of layers whose output is added to the residual stream."""
        return self.init_std / math.sqrt(2 * self.num_layers)

    @property
    def description(self) -> str:
        """The family, and in what the model differs from it."""
        own = [
            f"{name} {getattr(self, name)}"
            for name, usual in FAMILIES[self.family].items()
            if getattr(self, name) != usual
        ]
        return f"{self.family} with {', '.join(own)}" if own else self.family
