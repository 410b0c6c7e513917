"""What a Hugging Face config.json says, in the words of our configuration; what PonderLM does not have is refused."""

from megatron_ponder.errors import UserError


def settings(theirs: dict) -> list[str]:
    """`--section.key value ...` that describe a model.

    Args:
        theirs: the content of config.json, of a `LlamaForCausalLM`, a `GPTNeoXForCausalLM` or an export.

    Raises:
        UserError: for another model, or for a feature that PonderLM does not have.
    """
    readers = {"llama": _llama, "gpt_neox": _gpt_neox, "ponderlm": _ponderlm}
    kind = theirs.get("model_type")
    if kind not in readers:
        raise UserError(
            f"model_type {kind} in config.json cannot be converted; give a LlamaForCausalLM, a GPTNeoXForCausalLM or "
            "an export of this package"
        )
    try:
        values = readers[kind](theirs)
    except KeyError as error:
        raise UserError(f"config.json lacks {error.args[0]}; download the model's own config.json again") from None
    values["data.sequence_length"] = min(2048, values["model.max_position_embeddings"])
    return [part for key, value in values.items() for part in (f"--{key}", _text(value))]


def _llama(theirs: dict) -> dict[str, object]:
    _only(theirs, attention_bias=(False,), mlp_bias=(False,), hidden_act=("silu",))
    rope = _rope(theirs)
    _refuse(rope.get("partial_rotary_factor", 1.0) != 1, "partial_rotary_factor", rope.get("partial_rotary_factor"))
    return _plain(theirs) | _llama_fields(theirs) | {"model.rope_theta": _theta(rope, theirs, "rope_theta")}


def _gpt_neox(theirs: dict) -> dict[str, object]:
    _only(theirs, attention_bias=(True,), hidden_act=("gelu",))
    rope = _rope(theirs)
    fraction = rope.get("partial_rotary_factor", theirs.get("rotary_pct", theirs.get("partial_rotary_factor", 0.25)))
    return (
        _plain(theirs)
        | _gpt_neox_fields(theirs)
        | {
            "model.rope_theta": _theta(rope, theirs, "rotary_emb_base"),
            "model.rotary_fraction": fraction,
        }
    )


def _ponderlm(theirs: dict) -> dict[str, object]:
    if theirs["base_family"] == "llama":
        family = _llama_fields(theirs) | {"model.rope_theta": theirs["rope_theta"]}
    else:
        family = _gpt_neox_fields(theirs) | {
            "model.rope_theta": theirs["rotary_emb_base"],
            "model.rotary_fraction": theirs["rotary_pct"],
        }
    names = ("mode", "max_steps", "jacobi_iterations", "threshold", "router_bias", "router_hidden_size")
    ponder = {f"ponder.{name}": theirs[f"ponder_{name}"] for name in names}
    return (
        _common(theirs)
        | family
        | ponder
        | {
            "ponder.embedding_scale": theirs["embedding_scale"],
            "data.reset_at_eod": theirs.get("ponder_eod_id") is not None,
        }
    )


def _plain(theirs: dict) -> dict[str, object]:
    """Fields of a model that knows nothing of pondering, after a look for what we do not have."""
    for name in ("quantization_config", "sliding_window"):
        _refuse(theirs.get(name) is not None, name, theirs.get(name))
    head_dim = theirs.get("head_dim")
    own = theirs["hidden_size"] // theirs["num_attention_heads"]
    _refuse(head_dim not in (None, own), "head_dim", head_dim)
    layers = set(theirs.get("layer_types") or ["full_attention"])
    _refuse(layers != {"full_attention"}, "layer_types", sorted(layers))
    return _common(theirs) | {"ponder.embedding_scale": 1.0}


def _common(theirs: dict) -> dict[str, object]:
    return {
        "model.vocab_size": theirs["vocab_size"],
        "model.hidden_size": theirs["hidden_size"],
        "model.ffn_hidden_size": theirs["intermediate_size"],
        "model.num_layers": theirs["num_hidden_layers"],
        "model.num_heads": theirs["num_attention_heads"],
        "model.max_position_embeddings": theirs["max_position_embeddings"],
        "model.tie_embeddings": theirs.get("tie_word_embeddings", False),
        "model.init_std": theirs.get("initializer_range", 0.02),
    }


def _llama_fields(theirs: dict) -> dict[str, object]:
    return {
        "model.family": "llama",
        "model.num_kv_heads": theirs.get("num_key_value_heads") or theirs["num_attention_heads"],
        "model.norm_epsilon": theirs.get("rms_norm_eps", 1e-6),
    }


def _gpt_neox_fields(theirs: dict) -> dict[str, object]:
    return {
        "model.family": "gpt_neox",
        "model.norm_epsilon": theirs.get("layer_norm_eps", 1e-5),
        "model.parallel_residual": theirs.get("use_parallel_residual", True),
    }


def _rope(theirs: dict) -> dict:
    """Rotary parameters: `rope_parameters` since transformers 5, before that `rope_scaling` and fields of their own."""
    rope = theirs.get("rope_parameters") or theirs.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    _refuse(kind != "default", "rope_type", kind)
    return rope


def _theta(rope: dict, theirs: dict, name: str) -> float:
    return rope.get("rope_theta", theirs.get(name, theirs.get("rope_theta", 10000.0)))


def _only(theirs: dict, **allowed: tuple[object, ...]) -> None:
    for name, values in allowed.items():
        _refuse(theirs.get(name, values[0]) not in values, name, theirs.get(name))


def _refuse(condition: bool, name: str, value: object) -> None:
    if condition:
        raise UserError(f"{name} {value} in config.json is something PonderLM does not have; convert another model")


def _text(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
