"""Configuration of PonderLM for Hugging Face transformers.

This file and the others named *_ponderlm.py are copied into every exported model, so they need only torch and
transformers.
"""

from transformers import PretrainedConfig

MODES = ("vanilla", "fixed", "adaptive", "pause", "loop", "ponderlm")


class PonderLMConfig(PretrainedConfig):
    """A transformer of the llama or gpt_neox family whose tokens may take additional latent steps.

    Fields of the transformer have the names that the family's own configuration gives them, and only the family's are
    kept.

    Args:
        base_family: `llama` or `gpt_neox`.
        num_key_value_heads: key and value heads; num_attention_heads unless given. Llama only.
        rms_norm_eps, rope_theta: llama only.
        layer_norm_eps, rotary_pct, rotary_emb_base, use_parallel_residual: gpt_neox only.
        ponder_mode: `vanilla` (no latent steps), `fixed` (ponder_max_steps for every token), `adaptive` (a router
            decides for each token), or `pause`, `loop` or `ponderlm`, with which these are compared.
        ponder_max_steps: K, the most latent steps of a token.
        ponder_jacobi_iterations: R, refinement passes of `forward` without a cache.
        ponder_threshold: τ, a step is executed while its weight is at least this; raise it for speed.
        ponder_router_bias: α, added k times to the router's logit of step k; positive buys more steps.
        ponder_router_hidden_size: width of a hidden layer in the router; 0 for a linear router.
        ponder_eod_id: token that ends a document: attention does not reach across it and positions restart after it.
            None if documents are not told apart.
        ponder_pieces: ids from this on have no piece in the tokenizer, and `generate` never gives them; None if all
            have one. `resize_token_embeddings` sets it.
        embedding_scale: c, factor on token embeddings.
    """

    model_type = "ponderlm"
    keys_to_ignore_at_inference = ["past_key_values", "cache", "executed_steps"]  # noqa: RUF012  (Trainer adds a list to it)

    def __init__(
        self,
        base_family: str = "llama",
        vocab_size: int = 32000,
        hidden_size: int = 768,
        intermediate_size: int = 2048,
        num_hidden_layers: int = 12,
        num_attention_heads: int = 12,
        num_key_value_heads: int | None = None,
        max_position_embeddings: int = 2048,
        initializer_range: float = 0.02,
        rms_norm_eps: float = 1e-5,
        rope_theta: float = 10000.0,
        layer_norm_eps: float = 1e-5,
        rotary_pct: float = 0.25,
        rotary_emb_base: float = 10000.0,
        use_parallel_residual: bool = True,
        tie_word_embeddings: bool = False,
        bos_token_id: int | None = None,
        eos_token_id: int | None = None,
        pad_token_id: int | None = None,
        ponder_mode: str = "adaptive",
        ponder_max_steps: int = 3,
        ponder_jacobi_iterations: int = 3,
        ponder_threshold: float = 1e-4,
        ponder_router_bias: float = 0.0,
        ponder_router_hidden_size: int = 0,
        ponder_eod_id: int | None = None,
        ponder_pieces: int | None = None,
        embedding_scale: float = 1.0,
        **kwargs,
    ) -> None:
        if base_family not in ("llama", "gpt_neox"):
            raise ValueError(f"base_family is {base_family}; it must be llama or gpt_neox")
        if ponder_mode not in MODES:
            raise ValueError(f"ponder_mode is {ponder_mode}; it must be one of {', '.join(MODES)}")
        if not 0 <= ponder_threshold <= 1:
            raise ValueError(f"ponder_threshold is {ponder_threshold}; it must lie between 0 (every step runs) and 1")
        self.base_family = base_family
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.max_position_embeddings = max_position_embeddings
        self.initializer_range = initializer_range
        if base_family == "llama":
            self.hidden_act = "silu"
            self.num_key_value_heads = num_key_value_heads or num_attention_heads
            self.rms_norm_eps = rms_norm_eps
            self.rope_theta = rope_theta
        else:
            self.hidden_act = "gelu"
            self.layer_norm_eps = layer_norm_eps
            self.rotary_pct = rotary_pct
            self.rotary_emb_base = rotary_emb_base
            self.use_parallel_residual = use_parallel_residual
        self.ponder_mode = ponder_mode
        self.ponder_max_steps = ponder_max_steps
        self.ponder_jacobi_iterations = ponder_jacobi_iterations
        self.ponder_threshold = ponder_threshold
        self.ponder_router_bias = ponder_router_bias
        self.ponder_router_hidden_size = ponder_router_hidden_size
        self.ponder_eod_id = ponder_eod_id
        self.ponder_pieces = ponder_pieces
        self.embedding_scale = embedding_scale
        self.tie_word_embeddings = tie_word_embeddings
        self.bos_token_id, self.eos_token_id, self.pad_token_id = bos_token_id, eos_token_id, pad_token_id
        kwargs.pop("hidden_act", None)
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
    def is_llama(self) -> bool:
        """Whether the transformer is of the llama family."""
        return self.base_family == "llama"

    @property
    def head_size(self) -> int:
        """Channels of one head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def rotated_channels(self) -> int:
        """Channels of each head that are rotated."""
        return self.head_size if self.is_llama else int(self.head_size * self.rotary_pct)
