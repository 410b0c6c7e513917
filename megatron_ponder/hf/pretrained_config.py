"""What a Hugging Face config.json says, in the words of our configuration; what PonderLM does not have is refused."""

import math
import re
from typing import get_args

from megatron_ponder.base.errors import UserError
from megatron_ponder.config.families import FAMILIES
from megatron_ponder.config.model import ROPE_SCALINGS
from megatron_ponder.config.ponder import Mode
from megatron_ponder.hf.fields import Fields
from megatron_ponder.hf.foreign_families import ACTIVATIONS, FAMILY_READERS, FamilyReader, require_no_window, residual
from megatron_ponder.hf.weights import from_export

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
        theirs: the content of config.json, of a model of a kind in `READERS`.

    Raises:
        UserError: for another model, a feature that PonderLM does not have, or a field that is not known or holds what
            it cannot.
    """
    fields = Fields(theirs)
    kind = fields.anything("model_type")
    if kind not in list(READERS):
        raise UserError(
            f"model_type {kind} in config.json cannot be converted; give an export of this package, or a model of "
            f"{', '.join(FAMILY_READERS)}"
        )
    values = _common(fields) | READERS[kind].settings(fields)
    if kind in FAMILY_READERS:
        values |= _plain(fields, FAMILY_READERS[kind].architecture)
    fields.harmless(_HARMLESS)
    fields.end()
    values["data.sequence_length"] = min(2048, values["model.max_position_embeddings"])
    return [part for key, value in values.items() for part in (f"--{key}", _text(value))]


def _common(fields: Fields) -> dict[str, object]:
    """What every kind of model has, after a look for what none of ours has."""
    for name in ("quantization_config", "compression_config", "cross_attention_hidden_size"):
        fields.only(name, None)
    for name in ("add_cross_attention", "is_encoder_decoder", "tie_encoder_decoder"):
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


def _ponderlm(fields: Fields) -> dict[str, object]:
    require_no_window(fields)
    fields.only("architectures", ["PonderLMForCausalLM"])
    auto_map = fields.part("auto_map")
    for name, code in AUTO_MAP.items():
        # transformers may put the name of a repository before that of the file.
        if str(auto_map.anything(name) or code).rpartition("--")[2] != code:
            raise auto_map.foreign(name)
    auto_map.end()
    family = fields.choice("base_family", *FAMILIES)
    features = _features if fields.anything("norm") is not None else FORMER_EXPORTS.get(family, _features)
    fields.harmless(["ponder_pieces"])  # which is the tokenizer's
    fields.only("ponder_confidence_exit", None)
    return {
        "model.family": family,
        **features(fields),
        "ponder.mode": fields.choice("ponder_mode", *get_args(Mode)),
        "ponder.latent_visibility": fields.only("ponder_latent_visibility", "all", "own"),
        "ponder.latent_steps": fields.whole("ponder_max_steps", least=0),
        "ponder_training.jacobi_iterations": fields.whole("ponder_jacobi_iterations", least=0),
        "inference.threshold": fields.number("ponder_threshold"),
        "inference.router_bias": fields.number("ponder_router_bias"),
        "ponder.router_hidden_size": fields.whole("ponder_router_hidden_size", least=0),
        "ponder.embedding_scale": fields.number("embedding_scale"),
        "ponder.latent_scale": _latent_scale(fields),
        "data.reset_at_eod": fields.anything("ponder_eod_id") is not None,
    }


def _latent_scale(fields: Fields) -> object:
    """The factor on latents of an export, which older ones do not say."""
    return "learned" if fields.anything("latent_scale") == "learned" else fields.number("latent_scale", 1.0)


def _features(fields: Fields) -> dict[str, object]:
    """Features of an export, each of which it says."""
    norm = fields.choice("norm", "rms", "layer")
    return {
        "model.norm": norm,
        "model.norm_epsilon": fields.number(f"{norm}_norm_eps"),
        "model.gated_ffn": fields.flag("gated_ffn"),
        "model.activation": ACTIVATIONS[fields.choice("hidden_act", "silu", "gelu", "gelu_pytorch_tanh")],
        "model.biases": fields.choice("biases", "none", "qkv", "all"),
        "model.qk_norm": fields.flag("qk_norm", False),
        "model.num_kv_heads": fields.whole("num_key_value_heads"),
        "model.rotary_fraction": fields.number("rotary_pct"),
        "model.rope_theta": fields.number("rope_theta"),
        "model.residual": residual(fields),
        "model.rope_scaling": fields.only("rope_scaling_type", *ROPE_SCALINGS),
    } | _optional_features(fields)


def _optional_features(fields: Fields) -> dict[str, object]:
    """Features that an export says if it has them, and that no older one has."""
    sizes = {"head_dim": "model.head_size", "rope_original_length": "model.rope_original_length"}
    numbers = ROPE_SCALINGS["yarn"].keys() - sizes.keys()
    given = lambda names: [name for name in names if fields.anything(name) is not None]
    values = {f"model.{name}": fields.number(name) for name in given(numbers)}
    return values | {sizes[name]: fields.whole(name) for name in given(sizes)}


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
        "model.residual": residual(fields),
        "model.rope_theta": fields.number("rotary_emb_base"),
        "model.rotary_fraction": fields.number("rotary_pct"),
    }


def _plain(fields: Fields, architecture: str) -> dict[str, object]:
    """What a model of another package says of pondering: nothing, or what PonderLM-2 does."""
    if fields.flag("recurrent_model", False):
        return _ponderlm_2(fields, fields.whole("hidden_size"))
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


def _text(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


# By `model_type`.
READERS = FAMILY_READERS | {
    "ponderlm": FamilyReader("PonderLMForCausalLM", _ponderlm, lambda weights, _: from_export(weights))
}
# By the family of exports that do not say their features.
FORMER_EXPORTS = {"llama": _former_llama, "gpt_neox": _former_gpt_neox}
