"""Configuration of PonderLM for Hugging Face transformers.

This file and the others named *_ponderlm.py are copied into every exported model, so they need only torch and
transformers.
"""

from transformers import PretrainedConfig

from .exits_ponderlm import check_exit

CHOICES = {
    "norm": ("rms", "layer"),
    "biases": ("none", "qkv", "all"),
    "hidden_act": ("silu", "gelu", "gelu_pytorch_tanh"),
    "rope_scaling_type": ("none", "linear", "llama3", "yarn"),
    "ponder_mode": ("vanilla", "fixed", "adaptive", "pause", "sps", "loop", "ponderlm"),
    "ponder_latent_visibility": ("all", "own"),
}


class PonderLMConfig(PretrainedConfig):
    """A transformer whose tokens may take additional latent steps.

    Features of the transformer have the names that configurations of transformers give them, if there is one.

    Args:
        base_family: the family whose features the model began with, as information; the features say what it is.
        norm: `rms` or `layer`.
        rms_norm_eps, layer_norm_eps: added to the variance in norms, under the name that fits the norm.
        gated_ffn: the feed-forward layer multiplies what is activated by a second projection.
        hidden_act: activation of the feed-forward layer, `silu`, `gelu` or `gelu_pytorch_tanh`.
        biases: linear layers that have one, `none`, `qkv` (queries, keys and values), or `all` but the head and the
            router.
        qk_norm: every head's query and key are normed before they are rotated.
        num_key_value_heads: key and value heads; num_attention_heads unless given.
        head_dim: channels of a head; hidden_size / num_attention_heads unless given.
        rotary_pct: share of each head's channels that are rotated.
        rope_theta: base of the rotary frequencies.
        rope_scaling_type: which of them are slowed down, `none`, all (`linear`), or those that turn seldom within
            rope_original_length, by a ramp over their turns (`llama3`) or over their channels (`yarn`).
        rope_factor: how many times slower they get.
        rope_original_length: longest sequence that the model knew before.
        rope_low_turns, rope_high_turns: turns within it up to which a frequency is slowed down in full, and from which
            not at all.
        rope_attention_factor: factor on rotated queries and keys.
        use_parallel_residual: attention and feed-forward layer read the same input.
        ponder_mode: `vanilla` (no latent steps), `fixed` (ponder_max_steps for every token), `adaptive` (a router
            decides for each token), or `pause`, `sps`, `loop` or `ponderlm`, with which these are compared.
        ponder_latent_visibility: who sees the latent slots of a token: its own and `all` later tokens, or its `own`
            alone, as in `sps`; `all` in exports of older versions.
        ponder_max_steps: K, the most latent steps of a token.
        ponder_jacobi_iterations: R, refinement passes of `forward` without a cache.
        ponder_threshold: τ, a step is executed while its weight is at least this; raise it for speed.
        ponder_router_bias: α, added k times to the router's logit of step k; positive buys more steps.
        ponder_confidence_exit: of mode `fixed`, `entropy:X` or `margin:X` (exits_ponderlm.py): a token stops at the
            first slot whose prediction has fewer than X nats, or whose likeliest token leads by X; then `forward`
            without a cache runs token by token, too, without gradients. None runs every step.
        ponder_router_hidden_size: width of a hidden layer in the router; 0 for a linear router.
        ponder_eod_id: token that ends a document: attention does not reach across it and positions restart after it.
            None if documents are not told apart.
        ponder_pieces: ids from this on have no piece in the tokenizer, and `generate` never gives them; None if all
            have one. `resize_token_embeddings` sets it.
        embedding_scale: c, factor on token embeddings.
        latent_scale: factor on hidden states that enter again as latents, a number, or `learned`, of which the
            logarithm is a weight; 1 in exports of older versions.
    """

    model_type = "ponderlm"
    attribute_map = {"rotary_emb_base": "rope_theta"}  # noqa: RUF012
    keys_to_ignore_at_inference = ["past_key_values", "cache", "executed_steps"]  # noqa: RUF012  (Trainer adds a list to it)

    def __init__(
        self,
        base_family: str | None = None,
        vocab_size: int = 32000,
        hidden_size: int = 768,
        intermediate_size: int = 2048,
        num_hidden_layers: int = 12,
        num_attention_heads: int = 12,
        num_key_value_heads: int | None = None,
        max_position_embeddings: int = 2048,
        initializer_range: float = 0.02,
        norm: str | None = None,
        rms_norm_eps: float = 1e-5,
        layer_norm_eps: float = 1e-5,
        gated_ffn: bool = True,
        hidden_act: str = "silu",
        biases: str = "none",
        qk_norm: bool = False,
        head_dim: int | None = None,
        rotary_pct: float = 1.0,
        rope_theta: float = 10000.0,
        rope_scaling_type: str = "none",
        rope_factor: float | None = None,
        rope_original_length: int | None = None,
        rope_low_turns: float | None = None,
        rope_high_turns: float | None = None,
        rope_attention_factor: float | None = None,
        use_parallel_residual: bool = False,
        tie_word_embeddings: bool = False,
        bos_token_id: int | None = None,
        eos_token_id: int | None = None,
        pad_token_id: int | None = None,
        ponder_mode: str = "adaptive",
        ponder_latent_visibility: str = "all",
        ponder_max_steps: int = 3,
        ponder_jacobi_iterations: int = 3,
        ponder_threshold: float = 1e-4,
        ponder_router_bias: float = 0.0,
        ponder_confidence_exit: str | None = None,
        ponder_router_hidden_size: int = 0,
        ponder_eod_id: int | None = None,
        ponder_pieces: int | None = None,
        embedding_scale: float = 1.0,
        latent_scale: float | str = 1.0,
        **kwargs,
    ) -> None:
        if base_family is not None and norm is None:
            raise ValueError(
                f"base_family is {base_family}; it must have norm and the other features beside it, which exports of "
                "older versions lack: load those with the files that came with them, or export the model again"
            )
        self.norm, self.biases, self.hidden_act, self.ponder_mode = norm or "rms", biases, hidden_act, ponder_mode
        self.rope_scaling_type, self.ponder_latent_visibility = rope_scaling_type, ponder_latent_visibility
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be one of {', '.join(allowed)}")
        if not 0 <= ponder_threshold <= 1:
            raise ValueError(f"ponder_threshold is {ponder_threshold}; it must lie between 0 (every step runs) and 1")
        check_exit(ponder_confidence_exit, ponder_mode, ponder_latent_visibility)
        if isinstance(latent_scale, str) and latent_scale != "learned":
            raise ValueError(f"latent_scale is {latent_scale}; it must be a number or learned")
        if self.norm == "rms":
            self.rms_norm_eps = rms_norm_eps
        else:
            self.layer_norm_eps = layer_norm_eps
        self.base_family = base_family
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads or num_attention_heads
        self.max_position_embeddings = max_position_embeddings
        self.initializer_range = initializer_range
        self.gated_ffn = gated_ffn
        self.qk_norm = qk_norm
        self.head_dim = head_dim or hidden_size // num_attention_heads
        self.rotary_pct = rotary_pct
        self.rope_theta = rope_theta
        self.rope_factor = rope_factor
        self.rope_original_length = rope_original_length
        self.rope_low_turns, self.rope_high_turns = rope_low_turns, rope_high_turns
        self.rope_attention_factor = rope_attention_factor
        self.use_parallel_residual = use_parallel_residual
        self.ponder_max_steps = ponder_max_steps
        self.ponder_jacobi_iterations = ponder_jacobi_iterations
        self.ponder_threshold = ponder_threshold
        self.ponder_router_bias = ponder_router_bias
        self.ponder_confidence_exit = ponder_confidence_exit
        self.ponder_router_hidden_size = ponder_router_hidden_size
        self.ponder_eod_id = ponder_eod_id
        self.ponder_pieces = ponder_pieces
        self.embedding_scale, self.latent_scale = embedding_scale, latent_scale
        self.tie_word_embeddings = tie_word_embeddings
        self.bos_token_id, self.eos_token_id, self.pad_token_id = bos_token_id, eos_token_id, pad_token_id
        super().__init__(
            tie_word_embeddings=tie_word_embeddings,
            bos_token_id=bos_token_id,
            eos_token_id=eos_token_id,
            pad_token_id=pad_token_id,
            **kwargs,
        )

    @property
    def ponder_steps(self) -> int:
        """Most latent steps of a token in this mode."""
        return 0 if self.ponder_mode == "vanilla" else self.ponder_max_steps

    @property
    def ponder_own(self) -> bool:
        """Whether the slots of latent steps are seen by their own token alone."""
        return self.ponder_mode == "sps" or self.ponder_latent_visibility == "own"

    @property
    def norm_eps(self) -> float:
        """What is added to the variance in every norm."""
        return self.rms_norm_eps if self.norm == "rms" else self.layer_norm_eps

    @property
    def rotated_channels(self) -> int:
        """Channels of each head that are rotated."""
        return int(self.head_dim * self.rotary_pct)
