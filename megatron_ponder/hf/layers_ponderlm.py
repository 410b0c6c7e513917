"""PonderLM's transformer, whose keys carry a weight, and its router.

Shape suffixes: B sequences, T slots, N heads, D channels of a head, H hidden.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer

from .cache_ponderlm import PonderLMCache
from .configuration_ponderlm import PonderLMConfig

# Kernels want head sizes in multiples of 8, so folding costs eight channels of which it uses two.
FOLDED_CHANNELS = 8


class PonderLMRMSNorm(nn.Module):
    """x / sqrt(mean(x²) + ε) · g, statistics in fp32 or better."""

    def __init__(self, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return (wide * (wide.square().mean(-1, keepdim=True) + self.eps).rsqrt()).to(x.dtype) * self.weight


def make_norm(config: PonderLMConfig) -> nn.Module:
    """The norm over the residual stream."""
    if config.norm == "rms":
        return PonderLMRMSNorm(config.hidden_size, config.norm_eps)
    return nn.LayerNorm(config.hidden_size, eps=config.norm_eps)


def rotation(positions: Tensor, config: PonderLMConfig, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines (B or 1, 1, T, rotated / 2) of the rotary embedding at positions (B or 1, T)."""
    wide = torch.promote_types(dtype, torch.float32)
    rotated = config.rotated_channels
    exponents = torch.arange(0, rotated, 2, device=positions.device, dtype=wide) / rotated
    frequencies = scaled(config.rope_theta**-exponents, config)
    angles = (positions.to(wide).unsqueeze(-1) * frequencies).unsqueeze(1)
    factor = config.rope_attention_factor or 1.0
    return angles.cos() * factor, angles.sin() * factor


def scaled(frequencies: Tensor, config: PonderLMConfig) -> Tensor:
    """Rotary frequencies (rotated / 2,), with those slowed down that the model's scaling of them says."""
    if config.rope_scaling_type == "none":
        return frequencies
    slowed, rotated = frequencies / config.rope_factor, config.rotated_channels
    if config.rope_scaling_type == "linear":
        return slowed
    low, high = config.rope_low_turns, config.rope_high_turns
    if config.rope_scaling_type == "llama3":
        turns = config.rope_original_length / (2 * math.pi) * frequencies
        kept = ((turns - low) / (high - low)).clamp(0, 1)
    else:
        # The pair of channels, as a real number, that makes so many turns within the original length.
        pair = lambda turns: (
            rotated * math.log(config.rope_original_length / turns / (2 * math.pi)) / (2 * math.log(config.rope_theta))
        )
        first, last = max(math.floor(pair(high)), 0), min(math.ceil(pair(low)), rotated - 1)
        pairs = torch.arange(len(frequencies), device=frequencies.device, dtype=frequencies.dtype)
        kept = 1 - ((pairs - first) / max(last - first, 1e-3)).clamp(0, 1)
    return slowed + kept * (frequencies - slowed)


def rotate(x_BNTD: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate the first channels of every head, first half against second half; the others pass through."""
    cos, sin = angles
    half = cos.shape[-1]
    first, second, rest = x_BNTD.split([half, half, x_BNTD.shape[-1] - 2 * half], -1)
    turned = torch.cat([first * cos - second * sin, second * cos + first * sin], -1)
    return torch.cat([turned.to(x_BNTD.dtype), rest], -1)


def fold(q_BNTD: Tensor, k_BNTD: Tensor, v_BNTD: Tensor, log_w_BT: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Add log w of each key to its attention logit by two more channels, which any attention kernel understands.

    q' = [q, c, c], k' = [k, high, low] with high + low = log w · √d / c gives q'·k'/√d = q·k/√d + log w. The low part
    is what rounding to the type of k took from the high one. c is the power of two nearest √d, which is exact.
    """
    head_size = q_BNTD.shape[-1]
    constant = 2.0 ** round(math.log2(math.sqrt(head_size)))
    scaled = (log_w_BT * (math.sqrt(head_size) / constant))[:, None, :, None].expand(-1, k_BNTD.shape[1], -1, -1)
    high = scaled.to(k_BNTD.dtype)
    low = (scaled - high.to(scaled.dtype)).to(k_BNTD.dtype)
    q = F.pad(F.pad(q_BNTD, (0, 2), value=constant), (0, FOLDED_CHANNELS - 2))
    k = F.pad(torch.cat([k_BNTD, high, low], -1), (0, FOLDED_CHANNELS - 2))
    return q, k, F.pad(v_BNTD, (0, FOLDED_CHANNELS))


def eager_attention(
    q_BNSD: Tensor, k_BMTD: Tensor, v_BMTD: Tensor, mask: Tensor | None, is_causal: bool, scale: float
) -> Tensor:
    """What PyTorch's `scaled_dot_product_attention` computes, written out; M key-value heads serve N query heads."""
    groups = q_BNSD.shape[1] // k_BMTD.shape[1]
    k, v = k_BMTD.repeat_interleave(groups, 1), v_BMTD.repeat_interleave(groups, 1)
    logits = q_BNSD @ k.transpose(2, 3) * scale
    if is_causal:
        mask = torch.ones(logits.shape[-2:], dtype=torch.bool, device=logits.device).tril()
    if mask is not None:
        logits = logits.masked_fill(~mask, torch.finfo(logits.dtype).min)
    wide = torch.promote_types(logits.dtype, torch.float32)
    return logits.softmax(-1, dtype=wide).to(v.dtype) @ v


def visible(documents_BL: Tensor | None, ids_BL: Tensor, slots: int, own: bool) -> Tensor | None:
    """Causal attention of so many slots a token, bool (B or 1, 1, T, T); None if nothing else is asked of it.

    Args:
        documents_BL: of every token the document in which attention stays; None if that is all of the sequence.
        ids_BL: the tokens.
        slots: of a token.
        own: all but the first are seen by their own token alone.
    """
    seen = None
    if documents_BL is not None:
        documents_BT = documents_BL.repeat_interleave(slots, 1)
        seen = (documents_BT.unsqueeze(2) == documents_BT.unsqueeze(1)).tril()
    if own and slots > 1:
        places = torch.arange(ids_BL.shape[1] * slots, device=ids_BL.device)
        tokens = places // slots
        of_tokens = ((places % slots == 0) | (tokens == tokens.unsqueeze(1))).tril().unsqueeze(0)
        seen = of_tokens if seen is None else seen & of_tokens
    return None if seen is None else seen.unsqueeze(1)


class WideLinear(nn.Linear):
    """A linear layer that computes in fp32 or better, whatever the type of its weights and of autocast."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            x = x.to(torch.promote_types(x.dtype, torch.float32))
            return F.linear(x, self.weight.to(x.dtype), self.bias.to(x.dtype))


class ResidualLinear(nn.Linear):
    """A linear layer whose output is added to the residual stream, for which it starts smaller in deeper models."""


class PonderLMAttention(nn.Module):
    """Multi-head attention with rotary positions; optional are grouped-query heads, norms of heads, and key weights."""

    def __init__(self, config: PonderLMConfig, layer_idx: int) -> None:
        super().__init__()
        self.config, self.layer_idx, self.head_size = config, layer_idx, config.head_dim
        hidden, bias = config.hidden_size, config.biases in ("qkv", "all")
        q_size, kv_size = config.num_attention_heads * self.head_size, config.num_key_value_heads * self.head_size
        self.q_proj = nn.Linear(hidden, q_size, bias=bias)
        self.k_proj = nn.Linear(hidden, kv_size, bias=bias)
        self.v_proj = nn.Linear(hidden, kv_size, bias=bias)
        self.o_proj = ResidualLinear(q_size, hidden, bias=config.biases == "all")
        norm = lambda: PonderLMRMSNorm(self.head_size, config.norm_eps) if config.qk_norm else None
        self.q_norm, self.k_norm = norm(), norm()

    def forward(
        self,
        x_BTH: Tensor,
        angles: tuple[Tensor, Tensor],
        log_w_BT: Tensor | None,
        mask: Tensor | None,
        cache: PonderLMCache | None,
    ) -> Tensor:
        """Attend from every slot to itself and the slots before it; arguments as in `PonderLMModel.forward`."""
        q, k, v = (
            proj(x_BTH).unflatten(-1, (-1, self.head_size)).transpose(1, 2)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, angles), rotate(k, angles)
        if log_w_BT is not None:
            q, k, v = fold(q, k, v, log_w_BT)
        if cache is not None:
            k, v = cache.update(k, v, self.layer_idx)
        is_causal, scale = cache is None and mask is None, self.head_size**-0.5
        if self.config._attn_implementation == "eager":
            y = eager_attention(q, k, v, mask, is_causal, scale)
        else:
            gqa = q.shape[1] != k.shape[1]
            y = F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=is_causal, scale=scale, enable_gqa=gqa
            )
        return self.o_proj(y[..., : self.head_size].transpose(1, 2).flatten(2))


class PonderLMMLP(nn.Module):
    """Feed-forward layer: W_down act(W_up x), or, if it is gated, W_down (act(W_gate x) · W_up x)."""

    def __init__(self, config: PonderLMConfig) -> None:
        super().__init__()
        hidden, ffn, bias = config.hidden_size, config.intermediate_size, config.biases == "all"
        self.act = ACT2FN[config.hidden_act]
        self.gate_proj = nn.Linear(hidden, ffn, bias=bias) if config.gated_ffn else None
        self.up_proj = nn.Linear(hidden, ffn, bias=bias)
        self.down_proj = ResidualLinear(ffn, hidden, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        if self.gate_proj is None:
            return self.down_proj(self.act(self.up_proj(x)))
        return self.down_proj(self.act(self.gate_proj(x)) * self.up_proj(x))


class PonderLMDecoderLayer(GradientCheckpointingLayer):
    """Attention and feed-forward on the residual stream, each after a norm."""

    def __init__(self, config: PonderLMConfig, layer_idx: int) -> None:
        super().__init__()
        self.parallel_residual = config.use_parallel_residual
        self.input_layernorm = make_norm(config)
        self.self_attn = PonderLMAttention(config, layer_idx)
        self.post_attention_layernorm = make_norm(config)
        self.mlp = PonderLMMLP(config)

    def forward(self, x_BTH: Tensor, *attention_arguments) -> Tensor:
        attended = self.self_attn(self.input_layernorm(x_BTH), *attention_arguments)
        if self.parallel_residual:
            return x_BTH + attended + self.mlp(self.post_attention_layernorm(x_BTH))
        x_BTH = x_BTH + attended
        return x_BTH + self.mlp(self.post_attention_layernorm(x_BTH))


class PonderLMModel(nn.Module):
    """Token embedding and the stack of blocks that every slot runs through."""

    def __init__(self, config: PonderLMConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(PonderLMDecoderLayer(config, index) for index in range(config.num_hidden_layers))
        self.norm = make_norm(config)

    def embed(self, ids: Tensor) -> Tensor:
        """c · E[x]: (...) ids → (..., H)."""
        return self.embed_tokens(ids) * self.config.embedding_scale

    def forward(
        self,
        x_BTH: Tensor,
        positions: Tensor,
        log_w_BT: Tensor | None = None,
        mask: Tensor | None = None,
        cache: PonderLMCache | None = None,
    ) -> Tensor:
        """Hidden states (B, T, H) of slots after the final norm.

        Args:
            x_BTH: inputs of the slots.
            positions: int64 (B or 1, T), RoPE positions.
            log_w_BT: log weight of each slot as a key; None where every weight is 1.
            mask: bool (B, 1, T, slots that can be seen), in place of the causal one.
            cache: with a slot opened; then T is 1.
        """
        angles = rotation(positions, self.config, x_BTH.dtype)
        for layer in self.layers:
            x_BTH = layer(x_BTH, angles, log_w_BT, mask, cache)
        return self.norm(x_BTH)


class PonderLMLatentScale(nn.Module):
    """Factor on hidden states that enter again as latents: a number, or learned, by its logarithm."""

    def __init__(self, config: PonderLMConfig) -> None:
        super().__init__()
        self.number = config.latent_scale
        self.log = nn.Parameter(torch.zeros(1)) if config.latent_scale == "learned" else None

    def forward(self, hidden: Tensor) -> Tensor:
        if self.log is not None:
            wide = torch.promote_types(hidden.dtype, torch.float32)
            return hidden * self.log.to(hidden.device, wide).exp().to(hidden.dtype)
        return hidden if self.number == 1 else hidden * self.number


class RouterOutput(WideLinear):
    """The layer that gives the router's logits; it starts without a preference among tokens."""


class PonderLMRouter(nn.Module):
    """Logits over 0..K latent steps from h_{t,0}, in fp32 or better."""

    def __init__(self, config: PonderLMConfig) -> None:
        super().__init__()
        width, options = config.ponder_router_hidden_size, config.ponder_max_steps + 1
        self.hidden = WideLinear(config.hidden_size, width) if width else None
        self.output = RouterOutput(width or config.hidden_size, options)

    def forward(self, h: Tensor) -> Tensor:
        return self.output(h if self.hidden is None else F.gelu(self.hidden(h)))


def document_layout(ids_BL: Tensor, present_BL: Tensor | None, eod_id: int | None) -> tuple[Tensor, Tensor | None]:
    """RoPE positions (B or 1, L), and document numbers (B, L) if attention is to stay within documents.

    Padding belongs to document -1 and does not count in positions.
    """
    if eod_id is None and present_BL is None:
        return torch.arange(ids_BL.shape[1], device=ids_BL.device).unsqueeze(0), None
    present = torch.ones_like(ids_BL, dtype=torch.bool) if present_BL is None else present_BL
    ends = torch.zeros_like(ids_BL) if eod_id is None else ((ids_BL == eod_id) & present).long()
    documents = ends.cumsum(1) - ends
    count = present.long().cumsum(1)
    before = F.pad((count * ends).cummax(1).values, (1, -1))  # tokens of earlier documents
    return (count - 1 - before).clamp(min=0), documents.masked_fill(~present, -1)
