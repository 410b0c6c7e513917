"""The section about the transformer."""

import math
from dataclasses import dataclass
from typing import Literal

from megatron_ponder.config.declarations import changeable, number_field
from megatron_ponder.config.families import FAMILIES, Family

# What each scaling of rotary frequencies is told by, and what that is unless given; None has to be given.
_RAMP = {"rope_factor": None, "rope_original_length": None, "rope_low_turns": 1.0}
ROPE_SCALINGS = {
    "none": {},
    "linear": {"rope_factor": None},
    "llama3": _RAMP | {"rope_high_turns": 4.0},
    "yarn": _RAMP | {"rope_high_turns": 32.0, "rope_attention_factor": None},
}
RopeScaling = Literal[tuple(ROPE_SCALINGS)]


@dataclass(frozen=True)
class ModelConfig:
    """The transformer. A feature that is not given is the family's."""

    family: Family = "llama"
    """Name of a set of [features](#families)."""
    hidden_size: int = number_field(768, 1, 2**20)
    """Width H of the residual stream."""
    num_layers: int = number_field(12, 1, 10_000)
    """Number of blocks."""
    num_heads: int = number_field(12, 1, 2**16)
    """Number of query heads."""
    num_kv_heads: int | None = number_field(None, 1, 2**16)
    """Number of key and value heads, a divisor of `num_heads`; `num_heads` unless given."""
    head_size: int | None = number_field(None, 1, 2**16)
    """Channels of a head; `hidden_size` / `num_heads` unless given."""
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
    activation: Literal["silu", "gelu", "gelu_tanh"] | None = None
    """Of the feed-forward layer: `silu`, `gelu`, which is the exact one, or `gelu_tanh`, which approximates it."""
    biases: Literal["none", "qkv", "all"] | None = None
    """Linear layers that have one: `none`, `qkv` (queries, keys and values), or `all` but the output head."""
    qk_norm: bool | None = None
    """RMSNorm of the query and the key of every head, before they are rotated."""
    rope_theta: float = number_field(10000.0, 1, 1e12)
    """Base of the rotary frequencies."""
    rope_scaling: RopeScaling = "none"
    """Which rotary frequencies are slowed down for longer sequences, `none`, all (`linear`), or those that turn seldom
    within `rope_original_length`, by a ramp over their number of turns (`llama3`) or over their place among the
    channels (`yarn`)."""
    rope_factor: float | None = number_field(None, 1, 1e6)
    """How many times slower they get."""
    rope_original_length: int | None = number_field(None, 1, 2**24)
    """Longest sequence in tokens that the model knew before."""
    rope_low_turns: float | None = number_field(None, 0, 1e6, above=True)
    """Turns within `rope_original_length` up to which a frequency is slowed down in full; 1 unless given."""
    rope_high_turns: float | None = number_field(None, 0, 1e6, above=True)
    """Turns from which it is left as it is; 4 with `llama3` and 32 with `yarn` unless given."""
    rope_attention_factor: float | None = number_field(None, 1e-3, 1e3)
    """With `yarn`, factor on rotated queries and keys; 0.1 ln `rope_factor` + 1 unless given."""
    rotary_fraction: float | None = number_field(None, 0, 1, above=True)
    """Share of each head's channels that are rotated."""
    residual: Literal["sequential", "parallel"] | None = None
    """`sequential` (the feed-forward layer reads what attention has changed) or `parallel` (both read the same)."""
    tie_embeddings: bool = False
    """Use the input embedding as output head."""
    init_std: float = changeable(number_field(0.02, 1e-6, 10))
    """Standard deviation of the initial weights of linear layers."""

    @property
    def rotated_channels(self) -> int:
        """Channels of a head that are rotated."""
        return int(self.head_size * self.rotary_fraction)

    @property
    def qkv_biases(self) -> bool:
        """Whether queries, keys and values have a bias."""
        return self.biases in ("qkv", "all")

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
