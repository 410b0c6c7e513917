"""What config.json files of other packages' models say of a transformer, in the words of our configuration.

A family of known features is a function here, its row of `FAMILY_READERS`, and its name in `config/families.py`.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

from megatron_ponder.base.errors import UserError
from megatron_ponder.hf.fields import Fields
from megatron_ponder.hf.weights import Weights, from_gpt_neox, from_llama

Settings = dict[str, object]

# By the name that transformers gives a function: ours.
ACTIVATIONS = {
    **dict.fromkeys(("silu", "swish"), "silu"),
    **dict.fromkeys(("gelu", "gelu_python"), "gelu"),
    **dict.fromkeys(("gelu_pytorch_tanh", "gelu_new", "gelu_fast"), "gelu_tanh"),
}
# The window of a mistral whose config.json does not mention one.
_MISTRAL_WINDOW = 4096


class FamilyReader(NamedTuple):
    """How one kind of model is read.

    Attributes:
        architecture: the class of transformers whose weights these are.
        settings: configuration keys and their values, from config.json.
        weights: weights by PonderLM's names, from theirs and the number of query heads.
    """

    architecture: str
    settings: Callable[[Fields], Settings]
    weights: Callable[[Weights, int], Weights] = lambda weights, _: from_llama(weights)


def _llama(fields: Fields) -> Settings:
    require_no_window(fields)
    fields.only("rope_interleaved", False)
    fields.only("is_llama_config", True)
    biases, in_feed_forward = fields.flag("attention_bias", False), fields.flag("mlp_bias", False)
    if biases != in_feed_forward:
        raise fields.foreign("attention_bias" if biases else "mlp_bias")
    key_heads = fields.whole("num_key_value_heads", fields.whole("num_attention_heads"))
    return _like_llama(fields, "llama", key_heads) | {"model.biases": "all" if biases else "none"}


def _mistral(fields: Fields) -> Settings:
    _require_wide_window(fields, _MISTRAL_WINDOW if fields.missing("sliding_window") else None)
    return _like_llama(fields, "mistral")


def _qwen2(fields: Fields) -> Settings:
    _window_if_used(fields)
    fields.only("use_mrope", False)
    return _like_llama(fields, "qwen2")


def _qwen3(fields: Fields) -> Settings:
    _window_if_used(fields)
    fields.only("attention_bias", False)
    return _like_llama(fields, "qwen3") | {"model.head_size": fields.whole("head_dim", 128)}


def _smollm3(fields: Fields) -> Settings:
    _window_if_used(fields)
    fields.only("attention_bias", False)
    fields.only("mlp_bias", False)
    layers, rotated = fields.whole("num_hidden_layers"), fields.anything("no_rope_layers")
    every = fields.whole("no_rope_layer_interval", 4)
    if rotated is None and every <= layers:
        raise fields.foreign("no_rope_layer_interval")
    if rotated is not None and not (isinstance(rotated, list) and len(rotated) == layers == rotated.count(1)):
        raise fields.foreign("no_rope_layers")
    return _like_llama(fields, "llama", theta=2e6) | {
        "model.tie_embeddings": fields.flag("tie_word_embeddings", True),
    }


def _like_llama(fields: Fields, family: str, key_heads: int | None = None, theta: float = 10000.0) -> Settings:
    """What models have whose layers are those of Llama, whatever else they have.

    Args:
        fields: of config.json.
        family: ours.
        key_heads: key and value heads; as the file must say unless given.
        theta: base of the rotary frequencies where the file has none.
    """
    fields.only("partial_rotary_factor", 1.0, 1)
    rope = _rope(fields, fields.number("rope_theta", theta), 1.0)
    fraction = rope["model.rotary_fraction"]
    if fraction != 1:
        raise UserError(
            f"partial_rotary_factor {fraction} in config.json is something that this kind of model does not have; "
            "convert another model"
        )
    head_size = {} if fields.anything("head_dim") is None else {"model.head_size": fields.whole("head_dim")}
    return {
        "model.family": family,
        "model.num_kv_heads": fields.whole("num_key_value_heads", key_heads),
        "model.norm_epsilon": fields.number("rms_norm_eps", 1e-6),
        "model.activation": ACTIVATIONS[fields.only("hidden_act", "silu", *ACTIVATIONS)],
        **head_size,
        **rope,
    }


def _gpt_neox(fields: Fields) -> Settings:
    require_no_window(fields)
    fields.only("attention_bias", True)
    fields.only("head_dim", fields.whole("hidden_size") // fields.whole("num_attention_heads"))
    # The newest name of each is the one that counts, as in transformers.
    theta = fields.number("rotary_emb_base", fields.number("rope_theta", 10000.0))
    fraction = fields.number("rotary_pct", fields.number("partial_rotary_factor", 0.25))
    return {
        "model.family": "gpt_neox",
        "model.norm_epsilon": fields.number("layer_norm_eps", 1e-5),
        "model.activation": ACTIVATIONS[fields.only("hidden_act", "gelu", *ACTIVATIONS)],
        "model.residual": residual(fields),
        **_rope(fields, theta, fraction),
    }


def residual(fields: Fields) -> str:
    """What the feed-forward layer reads, from a field that GPT-NeoX and our exports have."""
    return "parallel" if fields.flag("use_parallel_residual", True) else "sequential"


# Sliding windows ---------------------------------------------------------------------------------------------------


def require_no_window(fields: Fields) -> None:
    """Refuse every field that belongs to a window, in models that have none."""
    fields.only("sliding_window", None)
    fields.only("use_sliding_window", False)
    _only_layers(fields, "full_attention")


def _window_if_used(fields: Fields) -> None:
    """A window counts only where `use_sliding_window` says so."""
    fields.harmless(["max_window_layers"])
    if fields.flag("use_sliding_window", False):
        _require_wide_window(fields)
    else:
        fields.harmless(["sliding_window"])
        _only_layers(fields, "full_attention")


def _require_wide_window(fields: Fields, usual: int | None = None) -> None:
    """Refuse a window that hides tokens in sequences that the model is meant for."""
    _only_layers(fields, "full_attention", "sliding_attention")
    length = fields.whole("max_position_embeddings")
    window = fields.whole("sliding_window", usual or length)
    if window < length:
        raise UserError(
            f"sliding_window {window} in config.json hides tokens in sequences of up to max_position_embeddings "
            f"{length}, and PonderLM has no such window; set max_position_embeddings there to {window}, to use the "
            "model for sequences in which it hides none"
        )


def _only_layers(fields: Fields, *kinds: str) -> None:
    if set(fields.texts("layer_types")) - set(kinds):
        raise fields.foreign("layer_types")


# Rotary positions --------------------------------------------------------------------------------------------------


def _rope(fields: Fields, theta: float, fraction: float) -> Settings:
    """Rotary positions; an object of them counts more than the fields beside it.

    That object is `rope_parameters` since transformers 5, and was `rope_scaling` before, which still counts more.

    Args:
        fields: of config.json.
        theta: base of the frequencies beside the object.
        fraction: rotated share of a head beside it.
    """
    former = fields.anything("rope_scaling")
    if former is not None:
        fields.only("rope_parameters", None, former)
    rope = fields.part("rope_parameters" if former is None else "rope_scaling")
    name = "type" if rope.anything("rope_type") is None else "rope_type"
    kind = rope.anything(name) or "default"
    if kind not in list(_SCALINGS):
        raise rope.foreign(name)
    rope.only("type", kind)
    scaling = _SCALINGS[kind](rope, fields.whole("max_position_embeddings"))
    theta, fraction = rope.number("rope_theta", theta), rope.number("partial_rotary_factor", fraction)
    rope.end()
    return {"model.rope_theta": theta, "model.rotary_fraction": fraction, **scaling}


def _linear(rope: Fields, length: int) -> Settings:
    return {"model.rope_scaling": "linear", "model.rope_factor": rope.number("factor")}


def _llama3(rope: Fields, length: int) -> Settings:
    return {
        "model.rope_scaling": "llama3",
        "model.rope_factor": rope.number("factor"),
        "model.rope_original_length": rope.whole("original_max_position_embeddings", length),
        "model.rope_low_turns": rope.number("low_freq_factor"),
        "model.rope_high_turns": rope.number("high_freq_factor"),
    }


def _yarn(rope: Fields, length: int) -> Settings:
    rope.only("truncate", True)
    rope.harmless(["finetuned"])
    original = rope.whole("original_max_position_embeddings", length)
    factor = rope.number("factor", length / original)
    grown = lambda share: 0.1 * share * math.log(max(factor, 1.0)) + 1
    above, below = rope.number("mscale", 0.0), rope.number("mscale_all_dim", 0.0)
    if below < 0:  # may divide by zero
        raise rope.foreign("mscale_all_dim")
    usual = grown(above) / grown(below) if above and below else grown(1.0)
    return {
        "model.rope_scaling": "yarn",
        "model.rope_factor": factor,
        "model.rope_original_length": original,
        "model.rope_low_turns": rope.number("beta_slow", 1.0),
        "model.rope_high_turns": rope.number("beta_fast", 32.0),
        "model.rope_attention_factor": rope.number("attention_factor", usual),
    }


# By `rope_type`; from its object and the longest sequence of the model.
_SCALINGS: dict[str, Callable[[Fields, int], Settings]] = {
    "default": lambda rope, length: {},
    "linear": _linear,
    "llama3": _llama3,
    "yarn": _yarn,
}
# By `model_type`.
FAMILY_READERS = {
    "llama": FamilyReader("LlamaForCausalLM", _llama),
    "mistral": FamilyReader("MistralForCausalLM", _mistral),
    "qwen2": FamilyReader("Qwen2ForCausalLM", _qwen2),
    "qwen3": FamilyReader("Qwen3ForCausalLM", _qwen3),
    "smollm3": FamilyReader("SmolLM3ForCausalLM", _smollm3),
    "gpt_neox": FamilyReader("GPTNeoXForCausalLM", _gpt_neox, from_gpt_neox),
}
