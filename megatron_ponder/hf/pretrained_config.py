"""What a Hugging Face config.json says, in the words of our configuration; what PonderLM does not have is refused."""

import math
import re
from collections.abc import Callable
from typing import NamedTuple, get_args

from megatron_ponder.base.errors import UserError
from megatron_ponder.config.families import FAMILIES
from megatron_ponder.config.ponder import Mode
from megatron_ponder.hf.fields import Fields
from megatron_ponder.hf.weights import Weights, from_export, from_gpt_neox, from_llama

# Files of an export that define the model, and what in them transformers is to use.
AUTO_MAP = {
    "AutoConfig": "configuration_ponderlm.PonderLMConfig",
    "AutoModelForCausalLM": "modeling_ponderlm.PonderLMForCausalLM",
}
# What transformers has written into configurations of any version, and on which no logit of a decoder depends.
_HARMLESS = (
    # Where the file comes from, and how it is to be loaded.
    *("_attn_implementation", "_attn_implementation_autoset", "_commit_hash", "_name_or_path", "attn_implementation"),
    *("dtype", "torch_dtype", "transformers_version", "transformers.js_config", "unsloth_fixed", "unsloth_version"),
    # What a call returns, remembers, or saves memory by; in how many slices a matrix is multiplied.
    *("cache_implementation", "chunk_size_feed_forward", "gradient_checkpointing", "output_attentions"),
    *("output_hidden_states", "output_scores", "pretraining_tp", "return_dict", "return_dict_in_generate"),
    *("tf_legacy_loss", "torchscript", "use_bfloat16", "use_cache"),
    # Heads for other tasks, and the longest text that somebody meant.
    *("classifier_dropout", "finetuning_task", "id2label", "label2id", "max_sequence_length", "num_labels"),
    *("problem_type", "task_specific_params"),
    # Special tokens, which our tokenizer names.
    *("bos_token_id", "decoder_start_token_id", "eos_token_id", "forced_bos_token_id", "forced_eos_token_id"),
    *("pad_token_id", "prefix", "sep_token_id", "tokenizer_class"),
    # Settings of `generate`, which our commands have options for.
    *("bad_words_ids", "begin_suppress_tokens", "diversity_penalty", "do_sample", "early_stopping"),
    *("encoder_no_repeat_ngram_size", "exponential_decay_length_penalty", "length_penalty", "max_length", "min_length"),
    *("no_repeat_ngram_size", "num_beam_groups", "num_beams", "num_return_sequences", "remove_invalid_values"),
    *("repetition_penalty", "suppress_tokens", "temperature", "top_k", "top_p", "typical_p"),
    # A decoder's attention is causal either way.
    "is_decoder",
)
# Fields of released PonderLM-2 checkpoints that matter only in training, or only with `interpolation`.
_PONDERLM_2_HARMLESS = ("interpolation_use_topk", "random_jacobi_iterations", "softmax_temperature")
# In names of that project's code for the methods that it compares itself with, whose config.json looks the same.
_PONDERLM_2_BASELINES = re.compile(r"(?<![a-z])(addhidden|addpausetoken|loop|orin|pause|weightshare)(?![a-z])")
_DROPOUTS = ("attention_dropout", "hidden_dropout", "attention_probs_dropout_prob", "hidden_dropout_prob")


def settings(theirs: dict) -> list[str]:
    """`--section.key value ...` that describe a model.

    Args:
        theirs: the content of config.json, of a `LlamaForCausalLM`, a `GPTNeoXForCausalLM`, a PonderLM-2 checkpoint of
            either, or an export.

    Raises:
        UserError: for another model, a feature that PonderLM does not have, or a field that is not known or holds what
            it cannot.
    """
    fields = Fields(theirs)
    kind = fields.anything("model_type")
    if kind not in list(READERS):
        raise UserError(
            f"model_type {kind} in config.json cannot be converted; give a LlamaForCausalLM, a GPTNeoXForCausalLM or "
            "an export of this package"
        )
    values = _common(fields) | READERS[kind].settings(fields)
    fields.harmless(_HARMLESS)
    fields.end()
    values["data.sequence_length"] = min(2048, values["model.max_position_embeddings"])
    return [part for key, value in values.items() for part in (f"--{key}", _text(value))]


def _common(fields: Fields) -> dict[str, object]:
    """What every kind of model has, after a look for what none of ours has."""
    for name in ("quantization_config", "sliding_window", "compression_config", "cross_attention_hidden_size"):
        fields.only(name, None)
    for name in ("add_cross_attention", "is_encoder_decoder", "tie_encoder_decoder", "use_sliding_window"):
        fields.only(name, False)
    fields.only("pruned_heads", {})
    for name in _DROPOUTS:
        if fields.number(name, 0.0) != 0:
            raise UserError(f"{name} in config.json is not 0, but PonderLM trains without dropout; set it to 0 there")
    return {
        "model.vocab_size": fields.whole("vocab_size", least=2),
        "model.hidden_size": fields.whole("hidden_size"),
        "model.ffn_hidden_size": fields.whole("intermediate_size"),
        "model.num_layers": fields.whole("num_hidden_layers"),
        "model.num_heads": fields.whole("num_attention_heads"),
        "model.max_position_embeddings": fields.whole("max_position_embeddings"),
        "model.tie_embeddings": fields.flag("tie_word_embeddings", False),
        "model.init_std": fields.number("initializer_range", 0.02),
    }


def _llama(fields: Fields) -> dict[str, object]:
    fields.only("rope_interleaved", False)
    fields.only("is_llama_config", True)
    fields.only("partial_rotary_factor", 1.0, 1)
    biases, in_feed_forward = fields.flag("attention_bias", False), fields.flag("mlp_bias", False)
    if biases != in_feed_forward:
        raise fields.foreign("attention_bias" if biases else "mlp_bias")
    theta, fraction = _rope(fields, fields.number("rope_theta", 10000.0), 1.0)
    if fraction != 1:
        raise UserError(
            f"partial_rotary_factor {fraction} in config.json is something that this kind of model does not have; "
            "convert another model"
        )
    return _plain(fields, "LlamaForCausalLM") | {
        "model.family": "llama",
        "model.num_kv_heads": fields.whole("num_key_value_heads", fields.whole("num_attention_heads")),
        "model.norm_epsilon": fields.number("rms_norm_eps", 1e-6),
        "model.activation": fields.only("hidden_act", "silu", "gelu"),
        "model.biases": "all" if biases else "none",
        "model.rope_theta": theta,
    }


def _gpt_neox(fields: Fields) -> dict[str, object]:
    fields.only("attention_bias", True)
    # The newest name of each is the one that counts, as in transformers.
    theta = fields.number("rotary_emb_base", fields.number("rope_theta", 10000.0))
    fraction = fields.number("rotary_pct", fields.number("partial_rotary_factor", 0.25))
    theta, fraction = _rope(fields, theta, fraction)
    return _plain(fields, "GPTNeoXForCausalLM") | {
        "model.family": "gpt_neox",
        "model.norm_epsilon": fields.number("layer_norm_eps", 1e-5),
        "model.activation": fields.only("hidden_act", "gelu", "silu"),
        "model.residual": _residual(fields),
        "model.rope_theta": theta,
        "model.rotary_fraction": fraction,
    }


def _ponderlm(fields: Fields) -> dict[str, object]:
    fields.only("architectures", ["PonderLMForCausalLM"])
    auto_map = fields.part("auto_map")
    for name, code in AUTO_MAP.items():
        # transformers may put the name of a repository before that of the file.
        if str(auto_map.anything(name) or code).rpartition("--")[2] != code:
            raise auto_map.foreign(name)
    auto_map.end()
    family = fields.choice("base_family", *FAMILIES)
    features = _features if fields.anything("norm") is not None else FORMER_EXPORTS[family]
    fields.harmless(["ponder_pieces"])  # which is the tokenizer's
    return {
        "model.family": family,
        **features(fields),
        "ponder.mode": fields.choice("ponder_mode", *get_args(Mode)),
        "ponder.latent_steps": fields.whole("ponder_max_steps", least=0),
        "ponder_training.jacobi_iterations": fields.whole("ponder_jacobi_iterations", least=0),
        "inference.threshold": fields.number("ponder_threshold"),
        "inference.router_bias": fields.number("ponder_router_bias"),
        "ponder.router_hidden_size": fields.whole("ponder_router_hidden_size", least=0),
        "ponder.embedding_scale": fields.number("embedding_scale"),
        "data.reset_at_eod": fields.anything("ponder_eod_id") is not None,
    }


def _features(fields: Fields) -> dict[str, object]:
    """Features of an export, each of which it says."""
    norm = fields.choice("norm", "rms", "layer")
    return {
        "model.norm": norm,
        "model.norm_epsilon": fields.number(f"{norm}_norm_eps"),
        "model.gated_ffn": fields.flag("gated_ffn"),
        "model.activation": fields.choice("hidden_act", "silu", "gelu"),
        "model.biases": fields.choice("biases", "none", "all"),
        "model.num_kv_heads": fields.whole("num_key_value_heads"),
        "model.rotary_fraction": fields.number("rotary_pct"),
        "model.rope_theta": fields.number("rope_theta"),
        "model.residual": _residual(fields),
    }


def _former_llama(fields: Fields) -> dict[str, object]:
    """What an export of the llama family said before exports said every feature."""
    fields.only("hidden_act", "silu")
    return {
        "model.num_kv_heads": fields.whole("num_key_value_heads"),
        "model.norm_epsilon": fields.number("rms_norm_eps"),
        "model.rope_theta": fields.number("rope_theta"),
    }


def _former_gpt_neox(fields: Fields) -> dict[str, object]:
    """What an export of the gpt_neox family said before exports said every feature."""
    fields.only("hidden_act", "gelu")
    return {
        "model.norm_epsilon": fields.number("layer_norm_eps"),
        "model.residual": _residual(fields),
        "model.rope_theta": fields.number("rotary_emb_base"),
        "model.rotary_fraction": fields.number("rotary_pct"),
    }


def _plain(fields: Fields, architecture: str) -> dict[str, object]:
    """What a model of another package says of pondering: nothing, or what PonderLM-2 does."""
    heads, size = fields.whole("num_attention_heads"), fields.whole("hidden_size")
    fields.only("head_dim", size // heads)
    if set(fields.texts("layer_types")) - {"full_attention"}:
        raise fields.foreign("layer_types")
    if fields.flag("recurrent_model", False):
        return _ponderlm_2(fields, size)
    # Without `recurrent_model` that project's code computes what the plain model does, whatever these say.
    fields.harmless(["interpolation", "num_jacobi_iterations", "num_latent_thoughts", "scale_embeds"])
    fields.harmless(_PONDERLM_2_HARMLESS)
    fields.only("auto_map", None)
    # LLaMA's first conversions wrote the name in another way.
    fields.only("architectures", [architecture], [architecture.replace("Llama", "LLaMA")])
    return {"ponder.embedding_scale": 1.0}


def _ponderlm_2(fields: Fields, hidden_size: int) -> dict[str, object]:
    """A released PonderLM-2 model: every token takes K latent steps, evaluated by R refinements."""
    for name in ("auto_map", "architectures"):
        baseline = _PONDERLM_2_BASELINES.search(str(fields.anything(name)).lower())
        if baseline is not None:
            raise UserError(
                f"{name} in config.json is that of {baseline[0]}, which is not PonderLM-2 but a method that it is "
                "compared with; convert another model"
            )
    if fields.flag("interpolation"):
        raise fields.foreign("interpolation")
    fields.only("use_all_logits", False)
    fields.harmless(_PONDERLM_2_HARMLESS)
    steps = fields.whole("num_latent_thoughts", least=0)
    values = {
        "ponder.mode": "fixed" if steps else "vanilla",
        # Evaluation runs this many there, also where training drew the number (`random_jacobi_iterations`).
        "ponder_training.jacobi_iterations": fields.whole("num_jacobi_iterations", least=0),
        "ponder.embedding_scale": math.sqrt(2.5 * hidden_size) if fields.flag("scale_embeds") else 1.0,
    }
    return values | ({"ponder.latent_steps": steps} if steps else {})


def _residual(fields: Fields) -> str:
    return "parallel" if fields.flag("use_parallel_residual", True) else "sequential"


def _rope(fields: Fields, theta: float, fraction: float) -> tuple[float, float]:
    """Base of the rotary frequencies and rotated share of a head, which are as given unless an object of them differs.

    That object is `rope_parameters` since transformers 5, and was `rope_scaling` before.
    """
    for name in ("rope_scaling", "rope_parameters"):
        rope = fields.part(name)
        rope.only("rope_type", "default")
        rope.only("type", "default")
        theta = rope.number("rope_theta", theta)
        fraction = rope.number("partial_rotary_factor", fraction)
        rope.end()
    return theta, fraction


def _text(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


class Reader(NamedTuple):
    """How one kind of model is read.

    Attributes:
        settings: configuration keys and their values, from config.json.
        weights: weights by PonderLM's names, from theirs and the number of query heads.
    """

    settings: Callable[[Fields], dict[str, object]]
    weights: Callable[[Weights, int], Weights]


# By `model_type`.
READERS = {
    "llama": Reader(_llama, lambda weights, _: from_llama(weights)),
    "gpt_neox": Reader(_gpt_neox, from_gpt_neox),
    "ponderlm": Reader(_ponderlm, lambda weights, _: from_export(weights)),
}
# By the family of exports that do not say their features.
FORMER_EXPORTS = {"llama": _former_llama, "gpt_neox": _former_gpt_neox}
